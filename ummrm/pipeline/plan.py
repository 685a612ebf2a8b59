"""What a recipe's stages will take, computed from shapes alone: parameters, steps, tokens, FLOPs, memory.

Nothing here is measured. Models are built on the meta device; lengths are those of the data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ..config import DTYPES, UpcycleConfig
from ..hf.detect import find_family
from ..hf.families import known_family
from ..hf.registry import umm_class, upcycled_config
from .recipe import RecipeError


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        parameters: all.
        active: those of linear layers that one token passes, embeddings left out.
        layers: transformer layers.
        hidden_size: H.
    """

    parameters: int
    active: int
    layers: int
    hidden_size: int

    def flops(self, length: float) -> float:
        """FLOPs of a token's forward in texts of `length` tokens: two a weight, and attention over all of them."""
        return 2.0 * self.active + 4.0 * self.layers * self.hidden_size * length


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take.

    Attributes:
        stage: its name.
        parameters: of its model.
        trained: of those, how many are; frozen parameters and LoRA are not taken into account.
        steps: optimiser steps.
        tokens: that are forwarded, all passes together.
        flops: of its forwards and backwards.
        memory: bytes on one device: weights, gradients, AdamW's two moments, activations of one micro-batch.
    """

    stage: str
    parameters: int
    trained: int
    steps: int
    tokens: float
    flops: float
    memory: float


def shapes(config: Any, upcycle: UpcycleConfig) -> tuple[Shape, Shape]:
    """Of the dense reward model and of the mixture.

    Args:
        config: the stock model's.
        upcycle: what becomes of it.

    Raises:
        RecipeError: there is no reward model of its family, or it can't be upcycled.
    """
    mapping: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    stock = mapping.get(type(config), None)
    if stock is None:
        raise RecipeError(
            f"`model.path` must be of a family that has a class for reward models, and transformers has none for "
            f"model_type {config.model_type!r}."
        )
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        dense: Any = stock(config)
    if known_family(config.model_type) is None:
        _make_first_layers(dense)
    with torch.device("meta"):
        try:
            family = find_family(dense)
            moe: Any = umm_class(stock)(upcycled_config(dense.config, upcycle, family))
        except ValueError as error:
            raise RecipeError(f"`model.path` can't be upcycled: {error}") from error
    plain = _shape(dense)
    experts = upcycle.num_experts + upcycle.num_shared_experts
    passed = (
        1
        if upcycle.by_sequence and not upcycle.num_shared_experts
        else (upcycle.num_experts_per_tok + upcycle.num_shared_experts)
    )
    total = _shape(moe)
    copies = (total.parameters - plain.parameters) / max(experts - 1, 1)  # of all experts beyond the first, and routers
    mixture = Shape(total.parameters, plain.active + round((passed - 1) * copies), plain.layers, plain.hidden_size)
    return plain, mixture


def _make_first_layers(model: Any) -> None:
    """Gives the first layer of each list random weights: where a family has no row, its FFN is proven by its output."""
    state = torch.get_rng_state()
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > 0:
            module[0].to_empty(device="cpu")
            for parameter in module[0].parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            for buffer in module[0].buffers():
                buffer.zero_()
    torch.set_rng_state(state)


def _shape(model: Any) -> Shape:
    embedded = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    config = model.config.get_text_config()
    active = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embedded)
    layers = getattr(config, "num_hidden_layers", 0)
    return Shape(sum(p.numel() for p in model.parameters()), active, layers, getattr(config, "hidden_size", 0))


def plan(
    dense: Shape,
    mixture: Shape,
    arguments: dict[str, Any],
    *,
    dtype: str,
    pairs: int,
    texts: int,
    lengths: Sequence[int],
    members: int,
) -> list[StagePlan]:
    """What each stage that trains will take.

    Args:
        dense: of the dense model.
        mixture: of the mixture.
        arguments: each stage's.
        dtype: of the weights.
        pairs: training pairs.
        texts: for distillation.
        lengths: tokens of some of the texts.
        members: of the mixture, as a teacher; 0: it scores as one.
    """
    mean = sum(lengths) / max(len(lengths), 1)
    longest = max(lengths, default=0)
    made = []
    for stage, given in arguments.items():
        shape = mixture if stage == "train" else dense
        rows = texts if stage == "distill" else pairs
        per_row = 1 if stage == "distill" else 2  # texts
        batch = given.per_device_train_batch_size * given.gradient_accumulation_steps * given.world_size
        an_epoch = max(1, math.ceil(rows / batch))
        steps = given.max_steps if given.max_steps > 0 else math.ceil(given.num_train_epochs * an_epoch)
        tokens = steps * batch * per_row * mean
        passes = 4.0 if given.gradient_checkpointing else 3.0
        flops = passes * tokens * shape.flops(mean)
        if stage == "distill":  # the teacher's scores, once
            flops += rows * mean * dense.flops(mean) * max(members, 1)
        size = DTYPES[dtype]
        trained = 0 if stage == "merge" else shape.parameters
        held = mixture.parameters if stage == "merge" else shape.parameters
        states = size * held + 3 * size * trained
        memory = states + _activations(dense, given, per_row * longest, 2 if given.bf16 or given.fp16 else size)
        made.append(StagePlan(stage, held, trained, steps, tokens, flops, memory))
    return made


def _activations(shape: Shape, given: Any, tokens_a_row: int, size: int) -> float:
    """Bytes that a micro-batch keeps for backward: 17 numbers a token, layer and hidden unit, or with checkpointing one
    and those of a single layer (Korthikanti et al. 2022, arXiv 2205.05198, without attention's own matrices).
    """
    tokens = given.per_device_train_batch_size * tokens_a_row
    numbers = 17 * shape.layers if not given.gradient_checkpointing else shape.layers + 17
    return float(size * tokens * shape.hidden_size * numbers)
