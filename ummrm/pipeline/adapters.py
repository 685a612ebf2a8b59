"""LoRA in a run: which parameters of a stage's model get adapters, and that they are folded in when it is done.

The adapters themselves are peft's business. Without `target_modules` and `target_parameters` every linear layer below
the head gets one, every expert's among them; the head and routers are trained in whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..hf.head import maps_to_one
from ..nn.experts import Experts
from ..nn.router import Router
from ..nn.upcycled_linear import UpcycledLinear
from .arguments import numbers
from .recipe import RecipeError, check_arguments

OURS = ("task_type", "inference_mode", "peft_type", "base_model_name_or_path", "revision", "auto_mapping")
"""Arguments of `peft.LoraConfig` that a run decides."""


def check_lora(given: Mapping[str, Any]) -> None:
    """Raises RecipeError unless LoRA's arguments are some of `peft.LoraConfig`."""
    check_arguments(
        "lora", given, [name for name in inspect.signature(_peft().LoraConfig).parameters if name not in OURS]
    )
    try:
        _peft().LoraConfig(task_type="SEQ_CLS", **numbers("lora", given, _peft().LoraConfig))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`lora`: peft refuses its arguments: {' '.join(str(error).split())}") from error


def lora_config(given: Mapping[str, Any], model: Any) -> Any:
    """The `peft.LoraConfig` of a model."""
    head = maps_to_one(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    places: dict[str, list[str]] = {"target_modules": [], "target_parameters": [], "modules_to_save": list(head)}
    for name, module in model.named_modules():
        inside = model.base_model is not model and name.startswith(f"{model.base_model_prefix}.")
        if isinstance(module, Router):
            places["modules_to_save"].append(name)
        elif isinstance(module, (Experts, UpcycledLinear)) and name not in head:
            found = [f"{name}.{one}" for one, p in module.named_parameters(recurse=False) if p.dim() == 3]
            places["target_parameters"] += [one for one in found if one not in frozen]
        elif isinstance(module, nn.Linear) and inside and f"{name}.weight" not in frozen:
            places["target_modules"].append(name)
    chosen = {"target_modules", "target_parameters"} & set(given)
    defaults = {key: value for key, value in places.items() if not (chosen and key.startswith("target"))}
    return _peft().LoraConfig(
        task_type="SEQ_CLS", **{"target_modules": [], **defaults, **numbers("lora", given, _peft().LoraConfig)}
    )


def adapted(model: Any, config: Any, **options: Any) -> Any:
    """A model under fresh adapters, as a trainer makes it of a `peft.LoraConfig`.

    Raises:
        RecipeError: peft can't put them where `lora` says.
    """
    try:
        return _peft().get_peft_model(model, config, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`lora`: peft refuses its places: {' '.join(str(error).split())[:400]}") from error


def folded(model: Any) -> Any:
    """A model with its adapters folded in; one without is as it is."""
    return model.merge_and_unload() if hasattr(model, "peft_config") else model


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise RecipeError(f"`lora` needs peft ({error}); pip install 'ummrm[run]'.") from error
    return peft
