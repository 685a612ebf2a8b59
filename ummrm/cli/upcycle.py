"""`ummrm upcycle`: a saved dense model into a saved mixture of experts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .errors import UserError, blaming
from .headers import DTYPES, TensorHeader
from .outputs import check_output, check_space, replaced, save, streams
from .screen import Steps, note, quiet_libraries, say, size
from .source import Source, admit_code, has_tokenizer, open_source
from .weights import load, scratch_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import UpcycleConfig

_OUTPUT = "The output"
_REWARD_CLASS = "ForSequenceClassification"


def _panel(title: str):
    """Options under one title of --help: help, default, names where there is a short one, what stands for the value."""

    def option(text: str, default: object, *names: str, metavar: str | None = None) -> Any:
        # None stands for "not given", so that an option goes before the file and the file before the default
        text = f"{text.removesuffix('.')} (default: {default})."
        return typer.Option(*names, help=text, metavar=metavar, show_default=False, rich_help_panel=title)

    return option


_mixture, _router, _losses, _output = map(_panel, ("The mixture", "Its routers", "Losses in training", _OUTPUT))


def upcycle(
    dense: Annotated[str, typer.Argument(help="Folder or hub name (organisation/model) of a dense model.")],
    out: Annotated[str, typer.Argument(help="Folder for the upcycled model.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file of UpcycleConfig fields; options given here take precedence."),
    ] = None,
    assignment: Annotated[
        str | None, _mixture("How experts get their tokens: by token (a router) or by sequence.", "token")
    ] = None,
    num_experts: Annotated[
        int | None, _mixture("Routed experts, E.", "7, by sequence 4", "--num-experts", "-e")
    ] = None,
    num_experts_per_tok: Annotated[
        int | None, _mixture("Routed experts per token, K.", "5, by sequence 1", "--num-experts-per-tok", "-k")
    ] = None,
    num_shared_experts: Annotated[
        int | None, _mixture("Shared experts, S.", "1, by sequence 0", "--num-shared-experts", "-s")
    ] = None,
    experts_in: Annotated[
        str | None,
        _mixture(
            "By sequence: ffn; linear: every linear layer, attention's too; all: these and the reward head.",
            "ffn",
            metavar="PLACE",
        ),
    ] = None,
    evaluation: Annotated[
        str | None, _mixture("By sequence, outside training: mean of the members, or the number of one.", "mean")
    ] = None,
    layers: Annotated[str | None, _mixture("all, a number n (every n-th), or indices such as 3,7,11.", "all")] = None,
    expert_noise: Annotated[
        float | None,
        _mixture("Noise on each routed expert, in standard deviations; with 0 the mixture equals DENSE.", 0),
    ] = None,
    gate: Annotated[str | None, _router("shared_complement or fixed.", "shared_complement")] = None,
    fixed_shared_weight: Annotated[
        float | None, _router("The shared experts' gate weight under --gate fixed and by sequence.", 0.5)
    ] = None,
    router: Annotated[str | None, _router("linear or mlp.", "linear")] = None,
    router_noise: Annotated[str | None, _router("In training: none, jitter or learned.", "none")] = None,
    jitter_eps: Annotated[float | None, _router("Half-width of --router-noise jitter.", 0.01)] = None,
    router_init_std: Annotated[float | None, _router("Standard deviation of the initial weights.", 0.02)] = None,
    balancing_loss: Annotated[str | None, _losses("switch or cv_squared.", "switch")] = None,
    balancing_loss_coef: Annotated[float | None, _losses("Weight of the load-balancing loss.", 0.01)] = None,
    z_loss_coef: Annotated[float | None, _losses("Weight of the router z-loss.", 0.001)] = None,
    new_head: Annotated[
        bool | None,
        typer.Option(
            "--new-head/--no-new-head",
            help="For a base model, which has no reward head: start one (with --experts-in all one an expert), or "
            "upcycle it as it is.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    dtype: Annotated[str | None, _output("float32, bfloat16 or float16.", "that of DENSE")] = None,
    device: Annotated[str, _output("Where to compute: cpu, cuda or cuda:N.", "cpu")] = "cpu",
    seed: Annotated[int, _output("Seed of routers, noise and head, from 0.", 0)] = 0,
    revision: Annotated[str | None, _output("Of a hub name: a branch, tag or commit.", "main")] = None,
    max_shard_size: Annotated[str, _output("No weight file is larger, but for a single larger tensor.", "5GB")] = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Allow an OUT that holds something: model files in it are replaced, others stay.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Upcycles a saved dense model into a mixture of experts that computes the same.

    OUT is a Hugging Face model folder: after `import ummrm` the Auto classes
    load it, any loop trains it, and `ummrm merge` makes it dense again. The
    tokenizer and all else that is not weights or config comes along.

    On a CPU the weights go from file to file: a model that is larger than
    memory is upcycled too.

    Example: ummrm upcycle my-model moe-rm --new-head --assignment sequence --experts-in all
    """
    given = {
        "assignment": assignment,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "num_shared_experts": num_shared_experts,
        "experts_in": experts_in,
        "evaluation": int(evaluation) if evaluation is not None and evaluation.isdecimal() else evaluation,
        "layers": layers if layers is None else options.read_layers(layers),
        "expert_noise": expert_noise,
        "gate": gate,
        "fixed_shared_weight": fixed_shared_weight,
        "router": router,
        "router_noise": router_noise,
        "jitter_eps": jitter_eps,
        "router_init_std": router_init_std,
        "balancing_loss": balancing_loss,
        "balancing_loss_coef": balancing_loss_coef,
        "z_loss_coef": z_loss_coef,
    }
    fields = {} if config is None else options.read_options(config)
    fields |= {name: value for name, value in given.items() if value is not None}
    if fields.get("router_noise") == "none":
        fields["router_noise"] = None
    options.check_seed(seed)
    options.check_dtype(dtype)
    options.check_device(device)
    shard_size = options.read_shard_size(max_shard_size)
    with quiet_libraries():
        run(
            dense,
            out,
            fields,
            new_head=new_head,
            dtype=dtype,
            device=device,
            seed=seed,
            revision=revision,
            shard_size=shard_size,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )


def run(
    dense: str,
    out: str,
    fields: dict,
    *,
    new_head: bool | None,
    dtype: str | None,
    device: str,
    seed: int,
    revision: str | None,
    shard_size: int,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """The command with its options read."""
    import torch

    import ummrm

    from ..hf.shards import NotStreamable
    from ..upcycle import write_upcycled

    with blaming("", ValueError):
        settings = ummrm.UpcycleConfig.from_dict(fields)
    source = open_source(dense, revision)
    admit_code(source, trust_remote_code)
    _check_source(source, new_head)
    target = check_output(out, source.folder, overwrite)
    streamed = streams(target, device)
    with blaming("", ValueError):
        check_space(
            target, _upcycled_bytes(source, settings, dtype) + (scratch_bytes(source, dtype) if streamed else 0)
        )
    steps, was_there = Steps(3), replaced(target)
    torch.manual_seed(seed)
    with steps.step(f"loading {dense} ({size(source.num_bytes)})", own_bar=True):
        nameless = not source.config.get("architectures")
        model: Any = load(
            source,
            expect="dense",
            out=target,
            streamed=streamed,
            new_head=bool(new_head) and nameless,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        model = model.base_model if new_head and nameless else model
        model.config.name_or_path = dense  # a hub name, rather than its place in the cache
        model.to(device)
        if new_head and model.config.pad_token_id is None:
            _name_padding(model, source, out, trust_remote_code)
    what = "FFNs" if not settings.has_linear_experts else "linear layers"
    fresh: dict[str, Any] = {"new_head": True, "seed": seed} if new_head else {}

    def write(folder: Path) -> PreTrainedModel:
        with steps.step(f"copying {what} into experts"), blaming("", ValueError):
            if streamed:
                state = torch.get_rng_state()
                try:
                    return write_upcycled(model, folder, settings, max_shard_size=shard_size, **fresh)
                except NotStreamable as reason:
                    note(f"note: {reason}, so all of them are made in memory first")
                    torch.set_rng_state(state)
            moe: Any = ummrm.upcycle(model, settings, **fresh)
        moe.stock_class.save_pretrained(moe, folder, max_shard_size=shard_size)
        return moe

    moe = save(write, target, source, steps)
    say(f"{type(moe).__name__}, {sum(p.numel() for p in moe.parameters()):,} parameters, saved in {out}{was_there}")


def _name_padding(model: PreTrainedModel, source: Source, out: str, trust: bool) -> None:
    """Gives a fresh head the padding token by which it finds the last token of each sequence in a batch."""
    from transformers import AutoTokenizer

    config: Any = model.config
    missing = "note: the configuration has no pad_token_id, without which a head can't score a batch"
    if has_tokenizer(source.folder):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust)
        except Exception:  # whatever a stranger's files make of it
            tokenizer = None
        for name in ("pad", "eos"):
            token = getattr(tokenizer, f"{name}_token_id", None)
            if token is not None and 0 <= token < config.vocab_size:  # one that was added has no embedding
                config.pad_token_id = token
                note(f"{missing}; set to the tokenizer's {name} token, pad_token_id {token}")
                return
    note(f"{missing}; set pad_token_id in {Path(out) / 'config.json'} to the id that batches are padded with")


def _check_source(source: Source, new_head: bool | None) -> None:
    name = source.name
    if source.is_upcycled:
        raise UserError(f"{name} is upcycled already; train it, and `ummrm merge` it.")
    if source.config.get("quantization_config"):
        raise UserError(f"{name} must hold plain float weights, and has a quantisation; upcycle the model before it.")
    if (
        not any(map(source.config.get, ("architectures", "auto_map"))) and new_head is not False
    ):  # as some base models on the hub
        _check_nameless(source, new_head)
        return
    cls = stock_class(source)
    if new_head is None and _REWARD_CLASS not in cls.__name__:
        raise UserError(
            f"{name} is a {cls.__name__}, which has no reward head; give --new-head to start one, or --no-new-head to "
            "upcycle it as it is."
        )
    if new_head and _REWARD_CLASS in cls.__name__:
        raise UserError(f"{name} is a {cls.__name__} and has a reward head; leave --new-head out.")


def _check_nameless(source: Source, new_head: bool | None) -> None:
    """Whether a model that names no class in config.json can get a reward head."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    known = source.model_type in CONFIG_MAPPING
    what = f"{source.folder / 'config.json'} must name the model's class in `architectures`, and does not"
    if known and CONFIG_MAPPING[source.model_type] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{what}; transformers has no class with a reward head for model_type {source.model_type!r}, so --new-head "
            "can't start one."
        )
    if not known or not new_head:
        raise UserError(f"{what}; save the model again with its save_pretrained, or give --new-head to start a head.")


def stock_class(source: Source) -> type[PreTrainedModel]:
    """The transformers class that a folder's config.json names.

    Raises:
        UserError: there is no such model class, in transformers or in the code that was registered.
    """
    import transformers

    from ..hf.registry import registered_class

    name = source.class_name
    cls = getattr(transformers, name, None) or registered_class(source.model_type, name)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UserError(
            f"{source.folder / 'config.json'} names {name} in `architectures`, which is no model class of transformers "
            f"{transformers.__version__}; install the version of transformers that has it, or mend the name."
        )
    return cls


def _upcycled_bytes(source: Source, config: UpcycleConfig, dtype: str | None) -> int:
    """Bytes of the upcycled weights, without routers and experts of the head; too few for a family that has no row,
    whose layers aren't known.
    """
    from ..hf.families import FAMILIES

    if source.headers is None:
        return source.num_bytes
    factor = dict(DTYPES.values()).get(dtype or "")
    family = FAMILIES.get(source.model_type)
    found: dict[int, list[TensorHeader]] = {}
    if family is not None:
        modules = "|".join(re.escape(path) for path in family.paths.modules) if not config.has_linear_experts else ".+"
        linear = re.compile(rf"(?:.*\.)?{re.escape(family.layers)}\.(\d+)\.(?:{modules})\.(?:weight|bias)")
        for name, header in source.headers.items():
            weight = source.headers.get(re.sub(r"bias$", "weight", name))
            is_linear = weight is not None and len(weight.shape) == 2  # a norm's has one dimension
            if is_linear and (match := linear.fullmatch(name)):
                found.setdefault(int(match[1]), []).append(header)
    copies, layers = config.num_experts + config.num_shared_experts - 1, sorted(found)
    extra = [h for i in config.layer_indices(len(layers)) for h in found[layers[i]]] if layers else []

    def num_bytes(headers) -> int:
        return sum(h.elements * factor if factor else h.num_bytes for h in headers)

    return num_bytes(source.headers.values()) + copies * num_bytes(extra)
