"""A reward model from a model that has no reward head: a causal or masked language model, or a backbone alone.

The stock sequence-classification class of the same family takes the backbone's tensors over as they are; its head is
fresh, seeded, and said to be; so are the heads of experts that have their own. Upcycling such a model, or loading one
by name, is the business of others.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)

from ..nn.assignment import mixed_seed
from ..nn.upcycled_linear import UpcycledLinear
from .head import gives_scores, head_name
from .loading import load_checkpoint
from .modeling import UmmPreTrainedMixin
from .normalization import KEY as NORMALIZATION


def reward_model(
    backbone: PreTrainedModel | str | os.PathLike,
    tokenizer: Any = None,
    *,
    head_std: float | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A stock reward model that shares a backbone's tensors, under a fresh head with one output.

    For a model in memory what `AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)` is for one on
    disk, with a head that does not depend on the process's random state. `backbone` stays usable: both models hold the
    same parameters, with their dtypes, devices, modes and `requires_grad`; a language-modelling head, tied to the
    embeddings or not, stays with `backbone`. `ummrm.upcycle(backbone, config, new_head=True)` calls this.

    Args:
        backbone: a causal or masked language model, a backbone alone (`AutoModel`), or the folder or hub name of one.
        tokenizer: its padding token (its end-of-sequence token where it has none) becomes the configuration's
            `pad_token_id`, by which a head finds the last token of each sequence; None leaves the configuration as is.
        head_std: standard deviation of the normal initialisation of the head's last linear map; None is the
            configuration's `initializer_range`, 0.02 if it has none. 0 makes every score zero at first.
        seed: of the head, and of what lies between backbone and head (a pooler). Random states stay as they are.

    Returns:
        A model of the stock class (`LlamaForSequenceClassification`, ...).

    Raises:
        TypeError: `backbone` is no transformers model, or is one of another task.
        ValueError: it has a reward head or is upcycled already, its family has no class for reward models, the
            tokenizer has no token to pad with or one without an embedding, or `head_std` is negative.

    Warns:
        UserWarning: always: the head is fresh, and what the model scores means nothing before training.
    """
    if isinstance(backbone, (str, os.PathLike)):
        backbone = load_checkpoint(backbone, expect="dense")
    return _with_fresh_head(backbone, _reward_class(backbone), tokenizer, head_std, seed)


def with_fresh_head(model: PreTrainedModel, tokenizer: Any, seed: int) -> PreTrainedModel:
    """`reward_model` of a model that may have a reward head already, in the place of which comes a fresh one."""
    has_head = gives_scores(type(model)) and model.config.num_labels == 1
    return _with_fresh_head(model, type(model) if has_head else _reward_class(model), tokenizer, None, seed)


def _with_fresh_head(
    backbone: PreTrainedModel, stock: type[PreTrainedModel], tokenizer: Any, head_std: float | None, seed: int
) -> PreTrainedModel:
    config: Any = copy.deepcopy(backbone.config)
    if head_std is None:
        head_std = _default_std(config)
    if isinstance(head_std, bool) or not isinstance(head_std, (int, float)) or not 0 <= head_std < float("inf"):
        raise ValueError(f"`head_std` must be a finite number of at least 0, got {head_std!r}.")
    vars(config).pop(NORMALIZATION, None)  # of another head
    config.num_labels = 1
    config.architectures = [stock.__name__]
    if tokenizer is not None:
        config.get_text_config().pad_token_id = _padding(tokenizer, backbone)
    with torch.device("meta"):
        model: Any = stock(config)
    _share(backbone.base_model, model.base_model)
    fresh = _start_fresh(model, backbone, head_std, seed)
    model.train(backbone.training)
    places = dict(model.base_model.named_modules(remove_duplicate=False))
    for name, module in backbone.base_model.named_modules(remove_duplicate=False):
        places[name].training = module.training
    missing = ""
    if config.get_text_config().pad_token_id is None:
        missing = (
            " The configuration names no padding token, without which a head can't score a batch: give `tokenizer`, "
            "or set `model.config.pad_token_id`."
        )
    warnings.warn(
        f"{', '.join(fresh)} of this {stock.__name__} is a fresh head (seed {seed}, std {head_std:g}); train it before "
        f"its scores mean anything.{missing}",
        stacklevel=3,
    )
    return model


@torch.no_grad()
def draw_heads(moe: Any, dense: PreTrainedModel, seed: int) -> None:
    """Gives each expert of a mixture a fresh reward head of its own.

    Expert 0 keeps the one of `dense`, which `seed` gave it; expert e has one of the same initialisation, drawn from
    the splitmix64 mix of `seed` and e. Random states stay as they are.

    Args:
        moe: a mixture with experts in its head.
        dense: what `with_fresh_head` made for it.
        seed: of that head.
    """
    head: Any = dense.get_submodule(head_name(dense))
    experts = moe.get_submodule(moe.umm_head)
    assert isinstance(experts, UpcycledLinear)
    experts.copy_from(head)
    other = copy.deepcopy(head)
    with _forked(head.weight.device):
        for expert in range(1, experts.config.num_experts):
            torch.manual_seed(mixed_seed(seed, expert))
            dense._init_weights(other)
            other.weight.normal_(0.0, _default_std(dense.config))
            experts.expert_weight[expert].copy_(other.weight)
            if experts.expert_bias is not None:
                experts.expert_bias[expert].copy_(other.bias)


def _default_std(config: Any) -> float:
    return float(getattr(config, "initializer_range", None) or 0.02)


def _forked(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _reward_class(backbone: object) -> type[PreTrainedModel]:
    if not isinstance(backbone, PreTrainedModel):
        hint = "merge its adapters first (merge_and_unload)" if hasattr(backbone, "peft_config") else "load one"
        raise TypeError(
            f"`backbone` must be a transformers PreTrainedModel, or the folder or name of one, got "
            f"{type(backbone).__name__}; {hint}."
        )
    name, config_class = type(backbone).__name__, type(backbone.config)
    if isinstance(backbone, UmmPreTrainedMixin):
        raise ValueError(f"`backbone` must be a dense model, got a {name}, which is upcycled already.")
    known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    stock = known.get(config_class, None)
    if stock is type(backbone):
        labels = backbone.config.num_labels
        raise ValueError(
            f"`backbone` must have no reward head, got a {name} with num_labels={labels}; "
            + ("it is a reward model: use it as it is." if labels == 1 else "give its backbone: model.base_model.")
        )
    headless = backbone.base_model is backbone
    if not headless and not any(
        type(backbone) is maps.get(config_class, None)
        for maps in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
    ):
        raise TypeError(
            f"`backbone` must be a causal or masked language model or a backbone alone, got a {name}, whose own head "
            "would be lost; if that is meant, give its backbone: model.base_model."
        )
    if stock is None:
        raise ValueError(
            f"`backbone` must be of a family that has a class for reward models, and transformers has none for "
            f"model_type {backbone.config.model_type!r}; use a model of another family."
        )
    return stock


def _padding(tokenizer: Any, backbone: PreTrainedModel) -> int:
    token = getattr(tokenizer, "pad_token_id", None)
    token = getattr(tokenizer, "eos_token_id", None) if token is None else token
    size = backbone.get_input_embeddings().num_embeddings
    if token is None or not 0 <= token < size:
        what = "no padding or end-of-sequence token" if token is None else f"{token}, outside the model's {size} tokens"
        raise ValueError(
            f"`tokenizer` must have a padding token that the model has an embedding of, got {what}; set "
            "tokenizer.pad_token to one of its tokens."
        )
    return token


def _share(source: nn.Module, target: nn.Module) -> None:
    """Gives `target`, built on the meta device, the parameters and buffers of the equally named modules of `source`."""
    places = dict(target.named_modules(remove_duplicate=False))
    for name, origin in source.named_modules(remove_duplicate=False):
        place = places.get(name)
        for kind in ("_parameters", "_buffers"):
            held = {key: tensor for key, tensor in getattr(origin, kind).items() if tensor is not None}
            lacking = sorted(held) if place is None else sorted(held.keys() - getattr(place, kind).keys())
            if lacking:
                raise ValueError(
                    f"`backbone` must hold what a {type(target).__name__} of its configuration holds, got another "
                    f"tensor, {'.'.join(filter(None, (name, lacking[0])))!r}; remove it (adapters: merge and unload)."
                )
            getattr(place, kind).update(held)
        if isinstance(origin, nn.Dropout) and isinstance(place, nn.Dropout):
            place.p = origin.p


def _start_fresh(model: Any, backbone: PreTrainedModel, head_std: float, seed: int) -> list[str]:
    """Initialises what no backbone has, and returns the names of the modules."""
    like = next(p for p in backbone.parameters() if p.is_floating_point())
    fresh = {name: m for name, m in model.named_modules() if any(p.is_meta for p in m.parameters(recurse=False))}
    with _forked(like.device), torch.no_grad():
        torch.manual_seed(seed)
        for module in fresh.values():
            module.to_empty(device=like.device, recurse=False).to(like.dtype)
            model._init_weights(module)
        heads = [m for m in fresh.values() if isinstance(m, nn.Linear) and m.out_features == 1]
        assert len(heads) == 1, f"{type(model).__name__} has {len(heads)} linear maps to one output"
        heads[0].weight.normal_(0.0, head_std) if head_std else heads[0].weight.zero_()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(
            f"{type(model).__name__} has tensors that {type(backbone).__name__} lacks, first {left[0]!r}: this version "
            "of transformers builds them differently; please report it with both class names."
        )
    return list(fresh)
