"""The processes of a run: one, or those that `accelerate launch` or `torchrun` has started, and the engine they use."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState


def processes() -> PartialState:
    """Their state; the first call joins them, on the devices that trainers will use."""
    return PartialState(cpu=not torch.accelerator.is_available())


def forget_engine() -> None:
    """Before a stage's trainer is made: accelerate else keeps the engine of the stage before.

    FSDP's settings then name the layers of another class, and DeepSpeed's the batch of other arguments.
    """
    AcceleratorState._reset_state()


def launched_engine() -> str:
    """What the launcher's configuration asks for: `fsdp`, `deepspeed`, or nothing."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return name.lower()
    return ""
