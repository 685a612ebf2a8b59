"""Finding the row of a model that has none in families.py: by its structure, sure or not at all.

What is found is a `Family` like any other; where the structure leaves a choice, the error says what was found and which
row to write. Whether a module is an FFN is proven by `probe.py`.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from ..nn.dense import FFNPaths, Projection, is_linear
from ..nn.probe import find_paths
from .families import FAMILIES, HF_ACTIVATIONS, REGISTERED, Family, known_family

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def find_family(dense: PreTrainedModel) -> Family:
    """The row of a stock model: of families.py, registered at run time, or found by structure.

    What is found is not registered: a checkpoint holds the row that it was made by, the next model is looked at anew.

    Raises:
        ValueError: no row, and the structure does not say for sure what it should be; says what was found and how to
            write the row.
    """
    return known_family(dense.config.model_type) or detect_family(dense)


def detect_family(dense: PreTrainedModel) -> Family:
    """Reads a row off a model's structure.

    Args:
        dense: a stock transformers model of any task, with real weights or on the meta device.

    Returns:
        The row: the backbone's only list of layers, the only child of a layer that is provably an FFN, the only config
        field that names its activation.

    Raises:
        ValueError: one of these is not there or not the only one.
    """
    config, backbone = dense.config, dense.base_model
    found: dict[str, Any] = {"model_type": config.model_type}
    known = CONFIG_MAPPING[config.model_type] if config.model_type in CONFIG_MAPPING else None
    if known is None or AutoModel._model_mapping.get(known, None) is not type(backbone):
        _give_up(found, f"its backbone, a {type(backbone).__name__}, is not the model that AutoModel has for it")
    lists = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    lists = {n: m for n, m in lists.items() if len(m) == getattr(config, "num_hidden_layers", len(m))}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if len(outer) != 1:
        _give_up(found, f"the backbone has {len(outer)} lists of layers ({', '.join(outer) or 'none'}), not one")
    ((path, layers),) = outer.items()
    found["layers"] = path
    kinds = sorted({type(layer).__name__ for layer in layers})
    if len(kinds) != 1:
        _give_up(found, f"the layers in {path} are of several classes ({', '.join(kinds)})")
    above = {n: m for n, m in backbone.named_modules() if n and path.startswith(f"{n}.")}
    nested = [n for n, m in above.items() if isinstance(m, PreTrainedModel)]
    if nested or "attention_mask" not in inspect.signature(type(backbone).forward).parameters:
        reason = f"{nested[0]} is a model of its own" if nested else "the backbone takes no attention_mask"
        _give_up(found, f"it is not certain which module gets the attention mask: {reason}", masked="?")
    site, paths = _only_ffn(found, layers)
    for layer in layers:
        if type(layer.get_submodule(site)) is not type(layers[0].get_submodule(site)):
            _give_up(found, f"{site} is of another class in another layer")
    fields = [f for f in _ACTIVATION_FIELDS if HF_ACTIVATIONS.get(str(getattr(config, f, None))) == paths.activation]
    below = {name: f"{site}.{path}" for name, path in paths.given.items()}
    found |= {"paths": FFNPaths(**below), "site": site}
    if len(fields) != 1:
        _give_up(found, f"the FFN computes {paths.activation}, and {len(fields)} config fields say so", activation="?")
    # Handed beside the call, the mask arrives whatever the backbone does with its arguments; and what it does with the
    # shape of its outputs (gpt_bigcode keeps its inputs') matters to none that runs all layers for each member.
    return Family(**found, activation=fields[0], passes_mask=False, shares_lower_layers=False)


def _only_ffn(found: dict, layers: nn.ModuleList) -> tuple[str, FFNPaths]:
    """Name and paths of the only child of the first layer that is an FFN."""
    proven, refusals = {}, []
    for name, child in layers[0].named_children():
        try:
            proven[name] = find_paths(_with_weights(child))
        except ValueError as error:
            refusals.append(f"{name}: {error}")
    if len(proven) == 1:
        return next(iter(proven.items()))
    linears = {n: Projection(m) for n, m in layers[0].named_modules() if is_linear(m)}
    shapes = ", ".join(f"{n} ({p.in_features} to {p.out_features})" for n, p in linears.items()) or "none"
    what = f"{len(proven)} children of a {type(layers[0]).__name__} are provably FFNs"
    what += f" ({', '.join(proven)})" if proven else f"; its linear maps are: {shapes}"
    _give_up(found, what, site="?", details=[r for r in refusals if "projections to be recognised" not in r])


def _with_weights(child: nn.Module) -> nn.Module:
    """The module, or a copy on the CPU with random weights of one that is on the meta device and may be an FFN.

    What a module computes of its weights is the same for all of them, so that a plan need not load a model's.
    """
    linears = sum(map(is_linear, child.modules()))
    if linears not in (2, 3) or not any(p.is_meta for p in child.parameters()):
        return child
    made, generator = copy.deepcopy(child).to_empty(device="cpu").float(), torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return made


def _give_up(found: dict, what: str, details: list[str] | None = None, **unknown: str) -> NoReturn:
    row = {"paths": FFNPaths(up="?", down="?"), "layers": "?"} | unknown | found
    known = ", ".join(sorted(FAMILIES | REGISTERED))
    raise ValueError(
        f"no family for model_type {found['model_type']!r}; ummrm knows {known}, and the structure does not say for "
        f"sure: {what}. "
        + "".join(f"({detail}) " for detail in details or [])
        + f"Register its row (docs/families.md says what the fields mean): ummrm.register_family({Family(**row)}), or "
        "replace its FFN modules yourself with UpcycledFFN.from_dense(ffn, config)."
    )
