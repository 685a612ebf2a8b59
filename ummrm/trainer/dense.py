"""Training a dense reward model, as a control or a teacher: TRL's RewardTrainer with what all trainers here share."""

from __future__ import annotations

from torch import nn

from ..hf.ensembles import check_reward_model
from .base import UmmTrainer, phase_of


class DenseRewardTrainer(UmmTrainer):
    """`trl.RewardTrainer` for a stock reward model: over-long pairs counted, metrics over pairs, resuming checked.

    Args:
        model: a reward model without experts, or its path.
        args: as in `RewardTrainer`.
        rest: further positional arguments of `RewardTrainer`.
        kwargs: keyword arguments of `RewardTrainer`.

    Raises:
        TypeError: the model has experts or no reward head.
        ValueError: the model has several labels.
    """

    _name = "dense reward model"

    def _check_model(self, model: nn.Module) -> None:
        if phase_of(model) is not None:
            raise TypeError(
                f"`model` must be a dense reward model, got a {type(model).__name__} with experts; train it with "
                "UmmRewardTrainer, or merge it first."
            )
        check_reward_model(model, "model")
