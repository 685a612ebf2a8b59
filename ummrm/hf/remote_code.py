"""Code that comes with a model (`auto_map` in its config.json), run only where the caller says that it is trusted.

Trusted code is registered with the Auto classes for the process, as a library that has the architecture would do it:
from then on such a model is upcycled, trained, merged and loaded as any registered one. A mixture keeps the code beside
its weights, and what names it in its config.json (`umm_code`), so that it loads where nothing is registered yet.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

KEY = "umm_code"
"""In a mixture's configuration: the stock model's `auto_map`."""
_PREFIX = "umm_"
_DYNAMIC = "transformers_modules."  # the package that transformers puts such code into


def code_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What a config.json says of code that comes with the model, without its tokenizer's: Auto class to reference."""
    found = config.get(KEY) or config.get("auto_map") or {}
    kept = found.items() if isinstance(found, Mapping) else ()
    return {auto: ref for auto, ref in kept if isinstance(ref, str) and "Tokenizer" not in auto}


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json can't be loaded without the code that comes with it."""
    return bool(code_of(config)) and str(config.get("model_type") or "").removeprefix(_PREFIX) not in CONFIG_MAPPING


def register_code(source: str | os.PathLike, **where: Any) -> None:
    """Imports the code of a folder or hub name and registers its classes; nothing to do for a known `model_type`.

    Args:
        source: a folder or a hub name, trusted by the caller: importing runs its code, which can do whatever you can.
        where: `revision` and the like, as for `from_pretrained`.

    Raises:
        OSError: there is no such folder or file.
        ImportError: the code needs a library that is not installed.
        ValueError: its `auto_map` names no configuration, or one of another `model_type`.
    """
    saved, _ = PreTrainedConfig.get_config_dict(source, **where)
    if not needs_code(saved):
        return
    code, model_type = code_of(saved), str(saved["model_type"]).removeprefix(_PREFIX)
    if "AutoConfig" not in code:
        raise ValueError(
            f"{source}: `auto_map` in its config.json must name its configuration's class (AutoConfig), and has "
            f"{', '.join(code)}; ask its authors, or add it."
        )
    config_class: Any = get_class_from_dynamic_module(code["AutoConfig"], source, **where)
    if getattr(config_class, "model_type", None) != model_type:
        raise ValueError(
            f"{source}: its config.json says model_type {model_type!r}, and its {config_class.__name__} says "
            f"{getattr(config_class, 'model_type', None)!r}; they must be the same."
        )
    models = {}
    for name, reference in code.items():
        auto: Any = getattr(modeling_auto, name, None)
        if name.startswith("AutoModel") and inspect.isclass(auto):
            own: Any = get_class_from_dynamic_module(reference, source, **where)
            own.config_class = config_class
            own.register_for_auto_class(name)
            models[auto] = own
    config_class.register_for_auto_class()
    AutoConfig.register(model_type, config_class)
    for auto, own in models.items():
        auto.register(config_class, own)


def own_class(name: str, source: str | os.PathLike, config: PreTrainedConfig, **where: Any) -> type | None:
    """The class of this name in the code that comes with a trusted model, registered or not; None if it has none."""
    for auto, reference in code_of(vars(config)).items():
        if auto.startswith("AutoModel") and reference.rpartition(".")[2] == name:
            known: Any = getattr(modeling_auto, auto)._model_mapping.get(type(config), None)
            if getattr(known, "__name__", None) == name:
                return known
            own: Any = get_class_from_dynamic_module(reference, source, **where)
            own.register_for_auto_class(auto)
            return own
    return None


def copy_code(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Copies the code that a model's stock class and configuration came with into the folder that it is saved in."""
    stock = getattr(type(model), "stock_class", type(model))
    for own in (stock, getattr(type(model.config), "umm_stock", type(model.config))):
        if own.__module__.startswith(_DYNAMIC):
            custom_object_save(own, folder)
