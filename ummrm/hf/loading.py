"""Loading checkpoints strictly: what was saved, all of it, or an error that names what is missing.

transformers fills a hole with random numbers and logs it. Here a missing, unexpected or misshapen tensor is an error;
a fresh head is made only where the caller asks for one. `check_loaded` is the rule, for our classes' own
`from_pretrained` too; `load_checkpoint` loads any folder or hub name as the class that saved it. A save into the folder
that was interrupted is settled first (see `replacing.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from . import replacing
from .remote_code import needs_code, own_class, register_code

_SHOWN = 3  # names of tensors in an error
_FLOATS = ("float32", "bfloat16", "float16", "float64")  # of plain weights
_WHERE = ("subfolder", "revision", "local_files_only", "token", "cache_dir")  # of a folder or hub name, for its config


def settle(source: str | os.PathLike | None, subfolder: str = "") -> None:
    """Completes or forgets an interrupted save into a local folder; a hub name has none.

    Raises, and warns, as `replacing.settle`.
    """
    if source is not None and os.path.isdir(folder := os.path.join(source, subfolder)):
        replacing.settle(Path(os.path.realpath(folder)))


def check_loaded(model: PreTrainedModel, info: dict[str, Any], source: object, *, new_head: bool) -> None:
    """Raises ValueError unless the checkpoint held every tensor of the model, and no other.

    A dense checkpoint may hold other heads, and a pooler, that its class has not (bert-base-uncased does): a warning
    says what is left out.

    Args:
        model: the loaded model; `config.architectures` says which class saved it.
        info: what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` returns: names after
            transformers has left out what it ties, ignores or converts.
        source: the folder or name, for the message.
        new_head: whether the head, and a pooler below it, may be missing or of another shape. A tensor of another
            class's head is not unexpected.
    """

    def is_head(key: str) -> bool:
        return not _is_backbones(model, key) or "pooler" in key.split(".")

    missing = [key for key in info["missing_keys"] if not (new_head and is_head(key))]
    shapes = {key: (list(found), list(wanted)) for key, found, wanted in info["mismatched_keys"]}
    wrong = [key for key in shapes if not (new_head and is_head(key))]
    saved_by = next(iter(model.config.architectures or ()), None)
    own = saved_by == type(model).__name__.removeprefix("FSDP") and not new_head  # which FSDP2 puts before it
    unexpected = [key for key in info["unexpected_keys"] if own or not is_head(key)]
    modules = dict(model.named_modules())
    others = [key for key in unexpected if is_head(key) and key.rpartition(".")[0] not in modules]
    if getattr(model.config, "umm", None) is None:
        unexpected = [key for key in unexpected if key not in others]
    if missing or wrong or unexpected:
        misshapen = [f"{key} is {shapes[key][0]} and should be {shapes[key][1]}" for key in wrong]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        parts = [f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
        if not unexpected and all(map(is_head, missing + wrong)):
            remedy = "Ask for a fresh head with new_head=True, or load a checkpoint that has one."
        else:
            remedy = "The checkpoint is incomplete or of another configuration; save the model again or get it anew."
        raise ValueError(
            f"{source} must hold every tensor of a {type(model).__name__} and no other; {'; '.join(parts)}. {remedy}"
        )
    if others:
        warnings.warn(
            f"{source} is loaded as a {type(model).__name__}, which leaves out what is another head's or a pooler's: "
            f"{_listed(others)}.",
            stacklevel=3,
        )


def asks_for_head(cls: type[PreTrainedModel], source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `cls.from_pretrained(source, **kwargs)` asks for a fresh head: by another number of labels.

    By any number of them where another class saved the folder, which may have no labels; Auto classes put the number
    into `config`, where it can't be told from the folder's own.
    """
    config = kwargs.get("config")
    if "num_labels" in kwargs or "id2label" in kwargs:
        wanted = kwargs["num_labels"] if "num_labels" in kwargs else len(kwargs["id2label"])
    elif isinstance(config, PreTrainedConfig):
        wanted = config.num_labels
    else:
        return False
    explicit = wanted is not None and not isinstance(config, PreTrainedConfig)
    if source is None:
        return explicit
    try:
        where = {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}
        saved, _ = PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError):  # no configuration beside the weights
        return explicit
    if explicit and cls.__name__ not in (saved.get("architectures") or ()):
        return True
    labels = saved.get("id2label")
    return wanted != (len(labels) if labels else saved.get("num_labels", 2))


def config_of(cls: type[PreTrainedModel], source: Any, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that `cls.from_pretrained(source, **kwargs)` builds its model by."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    where = {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}
    return cls.config_class.from_pretrained(source if config is None else config, **where)  # type: ignore[union-attr]


def load_checkpoint(
    source: str | os.PathLike,
    *,
    expect: Literal["dense", "upcycled"] | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a checkpoint as the class that saved it, every tensor of it.

    Args:
        source: a folder or a hub name.
        expect: refuse an upcycled (or a dense) checkpoint.
        new_head: load a backbone or a causal language model as a reward model with one output, its head freshly
            initialised where the checkpoint has none.
        trust_remote_code: run the code that comes with a model, which can do whatever you can; its classes are then
            registered with the Auto classes (see `remote_code.py`). Else such a model is refused.
        kwargs: passed to `from_pretrained` (`dtype`, `subfolder`, `revision`, `local_files_only`, ...).

    Returns:
        The model, in eval mode.

    Raises:
        OSError: there is no such folder, or a file of it can't be read.
        ValueError: the checkpoint is not of the expected kind, names no class that is known here, is damaged, or
            lacks a tensor. Each error is one line that names the source.

    Warns:
        UserWarning: an interrupted save into the folder was found, and completed or forgotten; or a dense checkpoint
            holds other heads, which are left out.
    """
    settle(source, kwargs.get("subfolder") or "")
    where = {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}
    config = _config(source, where, trust_remote_code)
    upcycled = getattr(config, "umm", None) is not None
    if expect == "dense" and upcycled:
        raise ValueError(f"{source} must be a dense model, and is an upcycled one (model_type {config.model_type!r}).")
    if expect == "upcycled" and not upcycled:
        raise ValueError(
            f"{source} is no upcycled model (model_type {config.model_type!r}); run `ummrm upcycle` on it first."
        )
    loader: Any = (
        AutoModelForSequenceClassification
        if new_head
        else _saved_class(source, config, where if trust_remote_code else None)
    )
    if new_head:
        kwargs |= {"num_labels": 1, "trust_remote_code": trust_remote_code}
        if upcycled:
            kwargs["new_head"] = True
    try:
        with _without_report():
            model, info = loader.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except SafetensorError as error:
        raise ValueError(
            f"{source}: its weights are damaged ({error}); save the model again or get it anew."
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:  # whose own message advises to run what the file holds
        raise ValueError(
            f"{source}: its weights are damaged ({type(error).__name__}: no whole file of tensors alone); save the "
            "model again or get it anew."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{source}: its weights can't be loaded: {_one_line(error)}") from error
    except OSError as error:
        raise OSError(f"{source}: {_one_line(error)}") from error
    check_loaded(model, info, source, new_head=new_head)
    return model


def check_headers(
    source: str | os.PathLike, headers: Mapping[str, tuple[str, tuple[int, ...]]], *, trust_remote_code: bool = False
) -> None:
    """Compares what weight files say that they hold with the model that config.json describes; reads no weights.

    Loading would make room for what the configuration says before it finds the weights to be others. Tensors that are
    missing, or that transformers renames, are left to it.

    Args:
        source: the folder.
        headers: dtype, by torch's name, and shape of each tensor in its weight files.
        trust_remote_code: as in `load_checkpoint`.

    Raises:
        OSError, ValueError: the configuration can't be used, or a tensor does not fit it; names the tensor.
    """
    config = _config(source, {}, trust_remote_code)
    where: dict[str, Any] | None = {} if trust_remote_code else None
    with torch.device("meta"):
        model = _saved_class(source, config, where)(config) if config.architectures else AutoModel.from_config(config)
    prefix = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict().items():
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in headers), None)
        if key is None:
            continue
        dtype, shape = headers[key]
        if tensor.is_floating_point() and dtype not in _FLOATS:
            raise ValueError(
                f"{source}: {key} must be of {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}, and is of {dtype}; save the "
                "model with plain float weights."
            )
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"{source} must hold the tensors of a {type(model).__name__} as config.json describes it; of another "
                f"shape: {key} is {list(shape)} and should be {list(tensor.shape)}. The checkpoint is of another "
                "configuration; save the model again or get it anew."
            )


def _config(source: str | os.PathLike, where: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    name = os.fspath(source)
    if os.path.isfile(name) or (not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")))):
        what = "a file" if os.path.isfile(name) else "no folder there"
        raise FileNotFoundError(f"the checkpoint must be a folder or a hub name, got {name}: {what}.")
    folder = os.path.join(name, where.get("subfolder", ""))
    if os.path.isdir(name) and not os.path.isfile(os.path.join(folder, "config.json")):
        raise FileNotFoundError(f"{folder} must hold a checkpoint, and has no config.json.")
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise ValueError(
            f"{folder} must hold one model, and has an adapter_config.json beside its config.json, whose adapter would "
            "be put on the weights; remove it, or merge the adapter (merge_and_unload) and save the model again."
        )
    try:
        if trust_remote_code:
            register_code(name, **where)
        elif needs_code(PreTrainedConfig.get_config_dict(name, **where)[0]):
            raise ValueError("it comes with code of its own; trust_remote_code=True runs it, if you trust its authors")
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
    except ValueError as error:
        raise ValueError(f"{name}: its configuration can't be used: {_one_line(error)}") from error
    except OSError as error:
        raise OSError(f"{name}: {_one_line(error)}") from error


def _saved_class(
    source: str | os.PathLike, config: PreTrainedConfig, where: dict[str, Any] | None
) -> type[PreTrainedModel]:
    """The class that saved a checkpoint; `where` says that code which comes with it is trusted, and where it is."""
    name = next(iter(config.architectures or ()), None)
    if not isinstance(name, str):
        raise ValueError(
            f"{source}/config.json must name its class in `architectures`, and does not; save the model again."
        )
    if getattr(config, "umm", None) is not None:
        known = {cls.__name__: cls for cls in _classes_of(config)}.get(name)
    else:
        own = None if where is None else own_class(name, source, config, **where)
        registered = {cls.__name__: cls for cls in _classes_of(config)}.get(name)
        known = own or getattr(transformers, name, None) or registered
    if not (inspect.isclass(known) and issubclass(known, PreTrainedModel)):
        raise ValueError(
            f"{source} holds a {name}, which is no model class of transformers {transformers.__version__} or of ummrm; "
            "install the version that saved it."
        )
    return known


def _classes_of(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """Every class that an Auto class has for a configuration."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        found = mapping.get(type(config), None) if mapping is not None else None
        yield from found if isinstance(found, (list, tuple)) else [found] if found is not None else []


def _is_backbones(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is the backbone's, by its name in a model with a head or in a backbone alone."""

    def inside(module: nn.Module, key: str) -> bool:
        names = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
        return key.partition(".")[0] in names

    prefix, backbone = f"{model.base_model_prefix}.", model.base_model
    if backbone is model:
        return inside(model, key) or inside(model, key.removeprefix(prefix))
    return key.startswith(prefix) or (inside(backbone, key) and not inside(model, key))


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(sorted(keys)[:_SHOWN]) + more


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers' table of missing tensors off the screen: `check_loaded` says it, on one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
