"""Evaluation mode for the length of a block, after which every module is in the mode that it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Puts whole networks into evaluation mode inside the `with` block.

    Modes are put back module by module: `model.train(mode)` would also wake a part that its user keeps in evaluation.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
