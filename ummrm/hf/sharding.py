"""Parameters that processes share, FSDP2's DTensors and DeepSpeed's ZeRO-3 partitions: put together where one is read.

Inside a forward the engine does it. Here is what reads parameters outside of one: logs, merging, export. Each takes
some modules or one tensor at a time, so that no process ever holds a whole model; each is a collective, which all
processes call in the same order. A model that only scores, as a teacher, is shared here too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations import deepspeed as engine

from ..nn.merging_ffn import MergingFFN
from ..nn.upcycled_ffn import UpcycledFFN
from .parallel import stack_placement

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:  # a torch without torch.distributed has neither, and `isinstance` finds none

    class DTensor:  # type: ignore[no-redef]
        pass

    class FSDPModule:  # type: ignore[no-redef]
        pass


_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers reads it, accelerate and TrainingArguments set it


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter that ZeRO-3 has taken into its care; it has no elements outside a forward."""
    return hasattr(tensor, "ds_id")


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share a parameter of a module."""
    return any(isinstance(p, DTensor) or is_partitioned(p) for p in module.parameters())


def reshard(module: nn.Module) -> None:
    """Puts FSDP2's parameters back into shards: what a forward without backward leaves gathered is in its dtype."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def class_of(model: nn.Module) -> type:
    """A model's class, without FSDP2's beside it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def partitions() -> bool:
    """Whether the trainer's arguments name ZeRO-3."""
    return engine.is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Models that are built or loaded inside the block are whole, also where the trainer's arguments name ZeRO-3, or
    FSDP's `cpu_ram_efficient_loading`, by which processes but the first load none.

    The one place that knows these names; tests/hf/test_sharding.py says when they go.
    """
    held, efficient = engine._hf_deepspeed_config_weak_ref, os.environ.pop(_EFFICIENT, None)
    engine._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        engine._hf_deepspeed_config_weak_ref = held
        if efficient is not None:
            os.environ.update({_EFFICIENT: efficient})


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's full value on every process, detached: in its own memory where nobody shares it, else in new one."""
    if not is_partitioned(tensor):
        held: Any = tensor.detach()
        return held.full_tensor() if isinstance(held, DTensor) else held
    with _gathered_partitions([tensor]):
        return tensor.detach().clone()


@contextlib.contextmanager
def gathered(*modules: nn.Module, names: tuple[str, ...] | None = None) -> Iterator[None]:
    """Modules with their parameters whole, on every process, inside the `with` block; changes to them are lost.

    Args:
        modules: with all modules below them.
        names: of the parameters, by their last part; None: all.
    """
    found = {
        (module, key): parameter
        for top in modules
        for module in top.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and (names is None or key in names)
    }
    shards = {place: p for place, p in found.items() if isinstance(p, DTensor)}
    with _gathered_partitions([p for p in found.values() if is_partitioned(p)]):
        try:
            for (module, key), parameter in shards.items():
                module._parameters[key] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
            yield
        finally:
            for (module, key), parameter in shards.items():
                module._parameters[key] = parameter


@contextlib.contextmanager
def shared(model: Any, device: torch.device) -> Iterator[None]:
    """Inside the block all processes share a whole model's parameters, and run it without a gradient; then drop it.

    By ZeRO-3 where the trainer's arguments name it, else by FSDP2, layer by layer. It computes in its own dtype. Each
    process takes its parts of one layer at a time, so a model whose weights lie in mapped files needs no more memory
    than its parts and a layer.

    Args:
        model: a model of transformers, the same on all processes.
        device: where parameters are put together.
    """
    if partitions():
        with _partitioned(model):
            yield
        return
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    layers = {*(model._no_split_modules or ())}
    units = [module for module in model.modules() if type(module).__name__ in layers]
    place = stack_placement([model], dist.get_world_size())
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, shard_placement_fn=place)
    yield


@contextlib.contextmanager
def _partitioned(model: Any) -> Iterator[None]:
    """Of the trainer's configuration the model gets what says where partitions lie; the batch it has no use for."""
    import deepspeed

    given = engine.deepspeed_config().get("zero_optimization", {})
    kept = ("offload_param", "stage3_param_persistence_threshold")
    sharing = {"stage": 3, **{key: given[key] for key in kept if given.get(key, "auto") != "auto"}}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sharing}
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)  # one by one: else it moves the whole of it first
    hold_experts(model)
    started, *_ = deepspeed.initialize(model=model, config=settings)
    try:
        yield
    finally:
        started.destroy()


def check_runs(model: nn.Module) -> None:
    """Raises ValueError if ZeRO-3 partitioned a model at loading, and DeepSpeed has not yet made it one that runs."""
    if not hasattr(model, "ds_external_parameters") and any(is_partitioned(p) for p in model.parameters()):
        raise ValueError(
            f"a {type(model).__name__} must be whole to run before it is trained, and ZeRO-3 has partitioned it as it "
            "was loaded; load it before the arguments are made that name ZeRO-3, and hand over the model, not its path."
        )


def hold_experts(model: nn.Module) -> None:
    """Tells DeepSpeed that layers use their experts' parameters themselves: under ZeRO-3 they are whole for so long.

    It gathers a module's parameters for that module's forward, and experts' forward hands them out. Its other way, a
    leaf module, reduces gradients too early where the layer's input has none, as below frozen embeddings.
    """
    import deepspeed

    for ffn in model.modules():
        if isinstance(ffn, (UpcycledFFN, MergingFFN)):
            for experts in filter(None, (ffn.experts, ffn.shared_experts)):
                for parameter in experts.parameters():
                    deepspeed.zero.register_external_parameter(ffn, parameter)


def own_steps(optimizer: Any) -> None:
    """Gives each tensor that an optimizer holds a count of steps of its own.

    From a universal checkpoint ZeRO-3 hands one tensor to all groups of parameters, each of which then counts it up:
    of two groups, one had its third step corrected as the fourth, and weights ended 6e-4 from where they should.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _gathered_partitions(parameters: list[Any]) -> contextlib.AbstractContextManager:
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed  # whoever has partitioned parameters has it

    return deepspeed.zero.GatheredParameters(list(dict.fromkeys(parameters)))
