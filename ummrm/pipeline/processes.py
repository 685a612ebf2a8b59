"""The processes of a run: one, or those that `accelerate launch` or `torchrun` has started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Their state; the first call joins them, on the devices that trainers will use."""
    return PartialState(cpu=not torch.accelerator.is_available())
