"""One row for each Hugging Face family: where its layers are, and where a layer keeps its FFN.

A row is all that `modeling.py`, `upcycle.py` and `merge.py` know about an architecture. To add a family, add a row
here and one tiny config to the family test; docs/families.md says what each field means.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..nn.dense import DenseFFN, FFNPaths

# transformers' activation names (transformers.activations.ACT2FN) for what the kernels compute
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers is upcycled.

    Attributes:
        model_type: transformers' name, e.g. `"llama"`.
        paths: the projections of a layer's dense FFN, below the layer.
        layers: path of the list of layers below the backbone (the model's `base_model`).
        site: where the upcycled FFN stands, below the layer; what stands there is called with [..., H] and returns it.
        bypass: submodules that become the identity, for an FFN that is no module of its own, or whose module does more
            (a dropout after the down projection): the site is then the down projection, and all before it is bypassed.
        activation: the config field that names the activation; not read where `paths` name it.
        masked: path below the backbone of the module that is called with the [batch, sequence] attention mask; ""
            is the backbone itself. OPT's heads call the backbone's decoder and leave the backbone out.
        passes_mask: whether that module passes keyword arguments that it does not know on to its layers. If not, the
            token mask is handed to the layers beside the call.
        shares_lower_layers: whether the backbone's layers below the first experts can run once for all members of a
            mixture by sequence. Not where the backbone gives its outputs the shape of its inputs: all layers then run
            for each member.
        rope_keys_v4: pairs (config key that transformers 4 reads, dotted key of transformers 5's `rope_parameters`), so
            that an exported model keeps its rotary base in tools that pin transformers 4.
        rope_scaling_keys_v4: the keys that transformers 4 takes in `rope_scaling` where it takes no others (`type` is
            its old name for `rope_type`); None takes all but those of `rope_keys_v4`, () writes no `rope_scaling`.
        refused: config fields that must have a given value, with the reason; anything else is a clear error.
    """

    model_type: str
    paths: FFNPaths
    layers: str = "layers"
    site: str = "mlp"
    bypass: tuple[str, ...] = ()
    activation: str = "hidden_act"
    masked: str = ""
    passes_mask: bool = True
    shares_lower_layers: bool = True
    rope_keys_v4: tuple[tuple[str, str], ...] = (
        ("rope_theta", "rope_theta"),
        ("partial_rotary_factor", "partial_rotary_factor"),
    )
    rope_scaling_keys_v4: tuple[str, ...] | None = None
    refused: tuple[tuple[str, object, str], ...] = ()

    def __str__(self) -> str:
        """The row as it would be written here: the fields that differ from their defaults."""
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, FFNPaths):
                named = value.given | ({"activation": value.activation} if value.activation else {})
                paths = ", ".join(f"{name}={path!r}" for name, path in named.items())
                given.append(f"paths=FFNPaths({paths})")
            elif value != field.default:
                given.append(f"{field.name}={value!r}")
        return f"Family({', '.join(given)})"

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-ready data; `from_dict` is its inverse."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: object) -> Family:
        """Builds a row from `to_dict`'s data, which may come from a stranger's file.

        Raises:
            ValueError: a field is missing, unknown or not of its kind; paths must be plain dotted names.
        """
        return cls(**_checked_fields(data))

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError if a model of this family with this config can't be upcycled."""
        self.hf_activation(config)
        for field, required, reason in self.refused:
            value = getattr(config, field, required)
            if value != required:
                raise ValueError(
                    f"config.{field} must be {required!r} to upcycle a {self.model_type} model, got {value!r}: {reason}"
                )

    def hf_activation(self, config: PreTrainedConfig) -> str:
        """The kernels' name of the config's activation.

        Raises:
            ValueError: no kernel computes it.
        """
        if self.paths.activation is not None:
            return self.paths.activation
        name = getattr(config, self.activation)
        if name not in HF_ACTIVATIONS:
            raise ValueError(
                f"config.{self.activation} must be one of {', '.join(HF_ACTIVATIONS)} to upcycle, got {name!r}; "
                "an FFN with another activation can't be upcycled."
            )
        return HF_ACTIVATIONS[name]

    def layer_list(self, backbone: nn.Module) -> nn.ModuleList:
        """The backbone's layers."""
        layers = backbone.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList), f"{self.layers} is a {type(layers).__name__}"
        return layers

    def dense_ffn(self, layer: nn.Module, config: PreTrainedConfig) -> DenseFFN:
        """The dense FFN of a stock layer."""
        return self.paths.read(layer, self.hf_activation(config))


_NAME = r"(?!__)[A-Za-z0-9_]+"
_PATH = re.compile(rf"{_NAME}(\.{_NAME})*")
_PROJECTION = re.compile(rf"{_NAME}(\.{_NAME})*(\[[01]\])?")
_MODEL_TYPE = re.compile(r"[A-Za-z0-9][\w.-]*")
_FIELD = re.compile(r"[A-Za-z]\w*")


def _checked_fields(data: object) -> dict[str, Any]:
    known = [field.name for field in fields(Family)]
    if not isinstance(data, dict) or set(data) != set(known):
        got = sorted(map(str, data)) if isinstance(data, dict) else repr(data)
        raise ValueError(f"a family's row must be a mapping of exactly {', '.join(known)}, got {got}.")

    def text(pattern: re.Pattern, value: object) -> bool:
        return isinstance(value, str) and pattern.fullmatch(value) is not None

    def texts(value: object, *patterns: re.Pattern) -> bool:
        return isinstance(value, list) and len(value) == len(patterns) and all(map(text, patterns, value))

    def refusal(value: object) -> bool:
        if not isinstance(value, list) or len(value) != 3:
            return False
        field, required, reason = value
        plain = required is None or isinstance(required, (bool, int, float, str))
        return plain and text(_FIELD, field) and isinstance(reason, str)

    paths = data["paths"]
    good = {
        "model_type": text(_MODEL_TYPE, data["model_type"]),
        "paths": isinstance(paths, dict)
        and set(paths) == {"gate", "up", "down", "activation"}
        and (paths["activation"] is None or paths["activation"] in HF_ACTIVATIONS.values())
        and (paths["gate"] is None or text(_PROJECTION, paths["gate"]))
        and text(_PROJECTION, paths["up"])
        and text(_PROJECTION, paths["down"]),
        "layers": text(_PATH, data["layers"]),
        "site": text(_PATH, data["site"]),
        "bypass": isinstance(data["bypass"], list) and all(text(_PATH, path) for path in data["bypass"]),
        "activation": text(_FIELD, data["activation"]),
        "masked": data["masked"] == "" or text(_PATH, data["masked"]),
        "passes_mask": isinstance(data["passes_mask"], bool),
        "shares_lower_layers": isinstance(data["shares_lower_layers"], bool),
        "rope_keys_v4": isinstance(data["rope_keys_v4"], list)
        and all(texts(pair, _FIELD, _PATH) for pair in data["rope_keys_v4"]),
        "rope_scaling_keys_v4": data["rope_scaling_keys_v4"] is None
        or (
            isinstance(data["rope_scaling_keys_v4"], list)
            and all(text(_FIELD, key) for key in data["rope_scaling_keys_v4"])
        ),
        "refused": isinstance(data["refused"], list) and all(map(refusal, data["refused"])),
    }
    for name in known:
        if not good[name]:
            raise ValueError(
                f"a family's row must have in `{name}` what docs/families.md says, paths as plain dotted names, got "
                f"{data[name]!r}."
            )

    def frozen(value: object) -> object:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {name: FFNPaths(**paths) if name == "paths" else frozen(data[name]) for name in known}


_GATED = FFNPaths(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_NEOX = FFNPaths(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
_CONV: dict[str, Any] = {
    "paths": FFNPaths(up="mlp.c_fc", down="mlp.c_proj"),
    "site": "mlp.c_proj",
    "bypass": ("mlp.c_fc", "mlp.act"),
}
_UNCHUNKED = (
    "chunk_size_feed_forward",
    0,
    "the token mask covers the whole sequence, and routing all tokens at once makes chunks pointless.",
)
_BERT: dict[str, Any] = {
    "paths": FFNPaths(up="intermediate.dense", down="output.dense"),
    "layers": "encoder.layer",
    "site": "output.dense",
    "bypass": ("intermediate",),
    "rope_keys_v4": (),
}
_FC: dict[str, Any] = {
    "paths": FFNPaths(up="fc1", down="fc2"),
    "site": "fc2",
    "bypass": ("fc1", "activation_fn"),
    "rope_keys_v4": (),
}
_NO_LAYERDROP = ("layerdrop", 0.0, "a skipped layer has no routing statistics for the auxiliary losses.")
_NO_DROPOUT_INSIDE = (
    "activation_dropout",
    0.0,
    "it lies between the activation and the down projection of every expert.",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _GATED),
        Family("mistral", _GATED),
        Family("qwen2", _GATED),
        Family("qwen3", _GATED),
        Family("gemma", _GATED),
        Family("gemma2", _GATED, activation="hidden_activation"),
        Family(
            "gemma3_text",
            _GATED,
            activation="hidden_activation",
            rope_keys_v4=(
                ("rope_theta", "full_attention.rope_theta"),
                ("rope_local_base_freq", "sliding_attention.rope_theta"),
            ),
        ),
        Family("olmo2", _GATED, rope_scaling_keys_v4=("type", "factor")),
        Family("granite", _GATED),
        Family("stablelm", _GATED),
        Family(
            "phi3",
            FFNPaths(gate="mlp.gate_up_proj[0]", up="mlp.gate_up_proj[1]", down="mlp.down_proj"),
            rope_scaling_keys_v4=("type", "short_factor", "long_factor"),
        ),
        Family("phi", FFNPaths(up="mlp.fc1", down="mlp.fc2")),
        Family(
            "gpt_neox",
            _NEOX,
            rope_keys_v4=(("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor")),
        ),
        Family("falcon", _NEOX, layers="h", activation="activation", passes_mask=False),
        Family("starcoder2", **_CONV),
        Family("gpt2", **_CONV, layers="h", activation="activation_function", rope_keys_v4=()),
        Family(
            "bloom",
            FFNPaths(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="gelu_tanh"),
            layers="h",
            site="mlp.dense_4h_to_h",
            bypass=("mlp.dense_h_to_4h", "mlp.gelu_impl"),
            passes_mask=False,
            rope_keys_v4=(),
            refused=(("slow_but_exact", False, "it reads slices of the down projection's weight past its module."),),
        ),
        Family(
            "mpt",
            FFNPaths(up="ffn.up_proj", down="ffn.down_proj", activation="gelu"),
            layers="blocks",
            site="ffn.down_proj",
            bypass=("ffn.up_proj", "ffn.act"),
            passes_mask=False,
            rope_keys_v4=(),
        ),
        Family(
            "openai-gpt",
            FFNPaths(up="mlp.c_fc", down="mlp.c_proj", activation="gelu_tanh"),
            layers="h",
            site="mlp.c_proj",
            bypass=("mlp.c_fc", "mlp.act"),
            passes_mask=False,
            shares_lower_layers=False,
            rope_keys_v4=(),
            refused=(("afn", "gelu", "it has names of its own for activations, and this one means gelu_tanh."),),
        ),
        Family(
            "ctrl",
            FFNPaths(up="ffn.0", down="ffn.2", activation="relu"),
            layers="h",
            site="ffn",
            passes_mask=False,
            rope_keys_v4=(),
        ),
        Family(
            "lfm2",
            FFNPaths(gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2", activation="silu"),
            site="feed_forward",
        ),
        Family(
            "seed_oss",
            _GATED,
            refused=(("residual_dropout", 0.0, "its FFN holds this dropout; load it with residual_dropout=0.0."),),
        ),
        Family(
            "opt",
            **_FC,
            layers="decoder.layers",
            activation="activation_function",
            masked="decoder",
            refused=(_NO_LAYERDROP,),
        ),
        Family("xglm", **_FC, activation="activation_function", refused=(_NO_LAYERDROP, _NO_DROPOUT_INSIDE)),
        Family("biogpt", **_FC, refused=(_NO_LAYERDROP, _NO_DROPOUT_INSIDE)),
        Family("bert", **_BERT, refused=(_UNCHUNKED,)),
        Family("roberta", **_BERT, refused=(_UNCHUNKED,)),
        Family("xlm-roberta", **_BERT, refused=(_UNCHUNKED,)),
        Family("xlm-roberta-xl", **_BERT, refused=(_UNCHUNKED,)),
        Family("camembert", **_BERT, refused=(_UNCHUNKED,)),
        Family("data2vec-text", **_BERT, refused=(_UNCHUNKED,)),
        Family("electra", **_BERT, refused=(_UNCHUNKED,)),
        Family("ernie", **_BERT, refused=(_UNCHUNKED,)),
        Family("megatron-bert", **_BERT, passes_mask=False, refused=(_UNCHUNKED,)),
        Family("rembert", **_BERT, passes_mask=False, refused=(_UNCHUNKED,)),
        Family("roformer", **_BERT, passes_mask=False, refused=(_UNCHUNKED,)),
        Family("mpnet", **_BERT, passes_mask=False),
        Family("deberta", **_BERT, passes_mask=False),
        Family("deberta-v2", **_BERT, passes_mask=False),
        Family(
            "convbert",
            **_BERT,
            passes_mask=False,
            refused=(_UNCHUNKED, ("num_groups", 1, "an FFN in groups is no pair of linear maps.")),
        ),
        Family(
            "big_bird",
            **_BERT,
            passes_mask=False,
            refused=(
                _UNCHUNKED,
                (
                    "attention_type",
                    "original_full",
                    "sparse attention lengthens the batch below the mask; load it with attention_type='original_full'.",
                ),
            ),
        ),
        Family(
            "modernbert",
            FFNPaths(gate="mlp.Wi[0]", up="mlp.Wi[1]", down="mlp.Wo"),
            activation="hidden_activation",
            rope_keys_v4=(
                ("global_rope_theta", "full_attention.rope_theta"),
                ("local_rope_theta", "sliding_attention.rope_theta"),
            ),
            rope_scaling_keys_v4=(),
            refused=(("mlp_dropout", 0.0, "it lies between the activation and the down projection of every expert."),),
        ),
    )
}

REGISTERED: dict[str, Family] = {}  # by `ummrm.register_family`, in this process


def known_family(model_type: str) -> Family | None:
    """The row of a `model_type`: of this file, or registered in this process."""
    return FAMILIES.get(model_type) or REGISTERED.get(model_type)
