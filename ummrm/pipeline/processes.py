"""The processes of a run: one, or those that `accelerate launch` or `torchrun` has started, and the engine they use."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Their state; the first call joins them, on the devices that trainers will use."""
    return PartialState(cpu=not torch.accelerator.is_available())


def forget_engine() -> None:
    """Before a stage's trainer is made: accelerate else keeps the engine of the stage before.

    FSDP's settings then name the layers of another class, and DeepSpeed's the batch of other arguments.
    """
    AcceleratorState._reset_state()


def launched_to_shard() -> bool:
    """Whether the configuration of `accelerate launch` asks for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")
