"""What a recipe's stages will take, computed from shapes alone: parameters, steps, tokens, FLOPs, memory.

Nothing here is measured. Models are built on the meta device, frozen and under adapters as stages have them; lengths
are those of the data.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import MergeConfig, UpcycleConfig
from ..hf.detect import find_family
from ..hf.registry import umm_class, upcycled_config
from ..merge import prepare_merge
from ..nn.experts import Experts
from ..nn.router import Router
from ..nn.upcycled_ffn import upcycled_ffns
from ..nn.upcycled_linear import UpcycledLinear
from .adapters import adapted, lora_config
from .recipe import RecipeError
from .start import freeze, stock_class_of


@dataclass(frozen=True)
class Shape:
    """What a stage's model holds, and what of it is trained.

    Attributes:
        parameters: all, adapters included.
        active: those of linear layers that one token passes, embeddings left out.
        layers: transformer layers.
        hidden_size: H.
        weights: bytes of all parameters.
        trained: parameters that the optimizer holds.
        gradients: bytes of theirs.
        learned: of `active`, those whose own gradients are computed: a frozen weight's is not, but that of an expert
            is that has an adapter, since it goes through the sum of both.
        adapted: numbers of experts that have adapters: their sum with them is kept for backward.
    """

    parameters: int
    active: float
    layers: int
    hidden_size: int
    weights: int
    trained: int
    gradients: int
    learned: float
    adapted: int = 0

    def flops(self, length: float) -> float:
        """FLOPs of a token's forward in texts of `length` tokens: two a weight, and attention over all of them."""
        return 2.0 * self.active + 4.0 * self.layers * self.hidden_size * length

    def training_flops(self, length: float, recomputed: bool) -> float:
        """FLOPs of a token's forward and backward, which goes through every layer.

        Args:
            length: tokens of its text.
            recomputed: whether the backward computes the forward again.
        """
        passes = 4.0 if recomputed else 3.0
        return passes * self.flops(length) - 2.0 * (self.active - self.learned)


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take.

    Attributes:
        stage: its name.
        parameters: of its model, adapters included.
        trained: of those, how many its optimizer holds.
        steps: optimiser steps.
        tokens: that are forwarded, all passes together.
        flops: of its forwards and backwards.
        weights: bytes of its model's parameters on one device.
        gradients: bytes on one device.
        optimizer: bytes on one device, of AdamW's two moments.
        activations: bytes of one micro-batch, as far as they are kept for backward.
        devices: that it was counted for.
        sharded: whether they share weights, gradients and moments (FSDP).
    """

    stage: str
    parameters: int
    trained: int
    steps: int
    tokens: float
    flops: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    devices: int = 1
    sharded: bool = False

    @property
    def memory(self) -> float:
        """Bytes on one device, all together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def shapes(
    config: Any,
    upcycle: UpcycleConfig,
    *,
    dtype: str = "float32",
    frozen: tuple[str, ...] = (),
    lora: Mapping[str, Any] | None = None,
    merge: MergeConfig | None = None,
) -> dict[str, Shape]:
    """Of the model of each stage that trains: `dense`, `train`, `merge` and `distill`.

    Args:
        config: the stock model's.
        upcycle: what becomes of it.
        dtype: of the weights.
        frozen: beginnings of the names of parameters that are not trained.
        lora: arguments of `peft.LoraConfig`; None: there are no adapters.
        merge: how merge weights are learned.

    Raises:
        RecipeError: there is no reward model of its family, it can't be upcycled, or peft refuses the adapters.
    """
    stock = stock_class_of(config)
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        dense: Any = stock(config)
        try:
            family = find_family(dense)
            moe, merging = (umm_class(stock)(upcycled_config(dense.config, upcycle, family)) for _ in range(2))
        except ValueError as error:
            raise RecipeError(f"`model.path` can't be upcycled: {error}") from error
    found = {}
    for stage, model in (("dense", dense), ("train", moe)):
        _set_dtype(model, dtype)
        freeze(model, frozen)
        found[stage] = _shape(model, _passed(model), lora)
    _set_dtype(merging, dtype)
    experts = {id(p): p.numel() / upcycle.num_experts for m in _routed(merging) for p in _weights(m)}
    # measuring the routing takes data, and changes no shape
    prepare_merge(merging, None if merge is None else dataclasses.replace(merge, alpha_init="uniform"))
    merged = _shape(merging, {}, None)
    found["merge"] = dataclasses.replace(merged, active=found["dense"].active, learned=sum(experts.values()))
    return {**found, "distill": found["dense"]}


def _set_dtype(model: Any, dtype: str) -> None:
    """As a stage holds it: routers stay in fp32."""
    model.to(getattr(torch, dtype))
    for module in model.modules():
        if isinstance(module, Router):
            module.float()


def _routed(model: Any) -> list[Any]:
    """The modules whose experts share the tokens."""
    return [*(ffn.experts for ffn in upcycled_ffns(model).values()), *_linear(model)]


def _linear(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, UpcycledLinear)]


def _weights(experts: Any) -> list[Any]:
    """Without biases, which have two dimensions in experts."""
    return [parameter for parameter in experts.parameters(recurse=False) if parameter.dim() == 3]


def _passed(model: Any) -> dict[int, float]:
    """How many numbers of each linear map's weight a token passes, by the parameter's `id`."""
    embedded = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    experts = {id(p) for m in model.modules() if isinstance(m, (Experts, UpcycledLinear)) for p in m.parameters()}
    left_out = embedded | experts
    found = {id(p): float(p.numel()) for p in model.parameters() if p.dim() >= 2 and id(p) not in left_out}
    for ffn in upcycled_ffns(model).values():
        share = ffn.config.num_experts_per_tok / ffn.config.num_experts
        found |= {id(p): p.numel() * share for p in _weights(ffn.experts)}
        if ffn.shared_experts is not None:
            found |= {id(p): float(p.numel()) for p in _weights(ffn.shared_experts)}
    return found | {id(p): p.numel() / m.config.num_experts for m in _linear(model) for p in _weights(m)}


def _shape(model: Any, passed: dict[int, float], lora: Mapping[str, Any] | None) -> Shape:
    """A model's, under adapters where there are any; `passed` is what `_passed` says of it."""
    config = model.config.get_text_config()
    base = dict(model.named_parameters())
    targets: list[str] = []  # parameters that the sum with their adapters stands in for
    added = 0
    if lora is not None:
        # how adapters start may ask for real weights, and changes no shape
        model = adapted(model, lora_config({**lora, "init_lora_weights": True}, model), low_cpu_mem_usage=True)
        targets = model.base_model.targeted_parameter_names
        places = tuple(f"{name}." for name in model.base_model.targeted_module_names)
        new = [(name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if "lora_" in name]
        added = sum(p.numel() for name, p in new if name.startswith(places) and p.dim() >= 2)
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    with_gradient = {id(parameter) for parameter in trained} | {id(base[name]) for name in targets}
    return Shape(
        parameters=sum(p.numel() for p in everything),
        active=sum(passed.values()) + added,
        layers=getattr(config, "num_hidden_layers", 0),
        hidden_size=getattr(config, "hidden_size", 0),
        weights=sum(p.nbytes for p in everything),
        trained=sum(p.numel() for p in trained),
        gradients=sum(p.nbytes for p in trained),
        learned=sum(share for parameter, share in passed.items() if parameter in with_gradient) + added,
        adapted=sum(base[name].numel() for name in targets),
    )


def plan(
    shapes: Mapping[str, Shape],
    arguments: Mapping[str, Any],
    *,
    pairs: int,
    texts: int,
    lengths: Sequence[int],
    members: int,
    devices: int | None = None,
) -> list[StagePlan]:
    """What each stage that trains will take.

    Args:
        shapes: each stage's, from the function of that name.
        arguments: each stage's.
        pairs: training pairs.
        texts: for distillation.
        lengths: tokens of some of the texts.
        members: of the mixture, as a teacher; 0: it scores as one.
        devices: how many train; None: as many as there are processes.
    """
    mean = sum(lengths) / max(len(lengths), 1)
    longest = max(lengths, default=0)
    made = []
    for stage, given in arguments.items():
        shape = shapes[stage]
        rows = texts if stage == "distill" else pairs
        per_row = 1 if stage == "distill" else 2  # texts
        count = given.world_size if devices is None else devices
        batch = given.per_device_train_batch_size * given.gradient_accumulation_steps * count
        an_epoch = max(1, math.ceil(rows / batch))
        steps = given.max_steps if given.max_steps > 0 else math.ceil(given.num_train_epochs * an_epoch)
        tokens = steps * batch * per_row * mean
        flops = tokens * shape.training_flops(mean, _recomputed(given))
        if stage == "distill":  # the teacher's scores, once
            flops += rows * mean * shapes["train"].flops(mean) * max(members, 1)
        sharded = bool(given.fsdp)
        parts = count if sharded else 1
        made.append(
            StagePlan(
                stage,
                shape.parameters,
                shape.trained,
                steps,
                tokens,
                flops,
                weights=shape.weights / parts,
                gradients=shape.gradients / parts,
                optimizer=2 * shape.gradients / parts,
                activations=_activations(shape, given, per_row * longest),
                devices=count,
                sharded=sharded,
            )
        )
    return made


def _recomputed(given: Any) -> bool:
    """Whether layers are computed again in the backward, by either of the two arguments that say so."""
    sharding = given.fsdp_config if given.fsdp else {}
    return given.gradient_checkpointing or str(sharding.get("activation_checkpointing", False)).lower() == "true"


def _activations(shape: Shape, given: Any, tokens_a_row: int) -> float:
    """Bytes that a micro-batch keeps for backward: 17 numbers a token, layer and hidden unit, or with checkpointing one
    and those of a single layer (Korthikanti et al. 2022, arXiv 2205.05198, without attention's own matrices); and the
    weights of experts with their adapters added, with checkpointing of a single layer.
    """
    size = 2.0 if given.bf16 or given.fp16 else shape.weights / max(shape.parameters, 1)
    tokens = given.per_device_train_batch_size * tokens_a_row
    if _recomputed(given):
        kept, adapted = shape.layers + 17, shape.adapted / max(shape.layers, 1)
    else:
        kept, adapted = 17 * shape.layers, shape.adapted
    return float(size * (tokens * shape.hidden_size * kept + adapted))
