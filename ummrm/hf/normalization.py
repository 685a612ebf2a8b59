"""Reward normalisation: (reward - mean) / std, kept in a model's configuration and, where asked, folded into its head.

The two numbers stand in `config.reward_normalization`, so they survive saving, loading, upcycling, merging and export
of any Hugging Face reward model, stock ones included. A forward never applies them: `score(..., normalized=True)`
does, and `fold_reward_normalization` builds them into the head for tools that read raw logits (TRL's RLOO and GRPO).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn.modes import evaluation_mode
from .head import maps_to_one

KEY = "reward_normalization"


@dataclass(frozen=True)
class RewardNormalization:
    """Mean and standard deviation of a model's raw rewards over a data set.

    Attributes:
        mean: any finite number.
        std: a positive, finite number.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not good or (name == "std" and value <= 0):
                expected = "a positive, finite number" if name == "std" else "a finite number"
                raise ValueError(
                    f"RewardNormalization: `{name}` must be {expected}, got {value!r}; measure it with "
                    "ummrm.measure_rewards over batches whose rewards differ."
                )

    def __call__(self, rewards: Tensor) -> Tensor:
        """Normalised rewards, in fp32 (fp64 for fp64)."""
        wide = torch.float64 if rewards.dtype == torch.float64 else torch.float32
        return (rewards.to(wide) - self.mean) / self.std


def set_reward_normalization(model: PreTrainedModel, normalization: RewardNormalization | None) -> None:
    """Keeps `normalization` in the model's configuration, or forgets it (None). It is saved with the model."""
    if normalization is None:
        vars(model.config).pop(KEY, None)
    else:
        setattr(model.config, KEY, asdict(normalization))


def reward_normalization(model: PreTrainedModel) -> RewardNormalization | None:
    """What the model's configuration holds, or None.

    Raises:
        ValueError: the entry is malformed.
    """
    entry = getattr(model.config, KEY, None)
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) != {"mean", "std"}:
        raise ValueError(
            f'config.{KEY} must be {{"mean": number, "std": number}}, got {entry!r}; set it with '
            "ummrm.set_reward_normalization."
        )
    return RewardNormalization(**entry)


@torch.no_grad()
def measure_rewards(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> RewardNormalization:
    """Mean and population standard deviation of the raw rewards over all batches, accumulated in fp64.

    Args:
        model: a reward model with one output; run in eval mode, its mode restored.
        batches: keyword arguments of its forward (`input_ids`, `attention_mask`), any batch sizes.

    Returns:
        The normalisation; keep it with `set_reward_normalization`.

    Raises:
        ValueError: fewer than two rewards, all rewards equal, or one not finite.
    """
    with evaluation_mode(model):
        rewards = torch.cat([score(model, batch).cpu().double() for batch in batches] or [torch.empty(0).double()])
    return of_rewards(rewards)


def of_rewards(rewards: Tensor) -> RewardNormalization:
    """The normalisation of rewards [N]; errors as in `measure_rewards`."""
    if rewards.numel() < 2:
        raise ValueError(f"`batches` must hold at least two rewards to measure a spread, got {rewards.numel()}.")
    rewards = rewards.double()
    return RewardNormalization(rewards.mean().item(), rewards.std(correction=0).item())


def score(model: PreTrainedModel, inputs: dict[str, Tensor], *, normalized: bool = False) -> Tensor:
    """Rewards of a batch.

    Args:
        model: a reward model with one output, in either phase or merged.
        inputs: keyword arguments of its forward.
        normalized: apply the normalisation that its configuration holds.

    Returns:
        [N] in the model's dtype, or fp32 (fp64) if normalised.

    Raises:
        ValueError: `normalized` is asked for and the configuration has none, or the model has several outputs.
    """
    logits = model(**inputs).logits
    if logits.dim() != 2 or logits.shape[1] != 1:
        raise ValueError(
            f"`model` must give one reward per sequence, logits [N, 1], got {list(logits.shape)}; load it "
            "with num_labels=1."
        )
    rewards = logits.squeeze(-1)
    if not normalized:
        return rewards
    normalization = reward_normalization(model)
    if normalization is None:
        raise ValueError(
            "`normalized` must be False for a model without a normalisation; measure one: "
            "ummrm.set_reward_normalization(model, ummrm.measure_rewards(model, batches))."
        )
    return normalization(rewards)


@torch.no_grad()
def fold_reward_normalization(model: PreTrainedModel) -> RewardNormalization | None:
    """Builds the normalisation into the model's linear head, or that of each expert, as far as a head can hold it.

    A head with a bias (BERT, RoBERTa, ModernBERT, ...) takes all of it, and the configuration's entry goes. A head
    without one (Llama, Qwen, ...: the stock class would ignore a bias in the file) takes the scale; what is left, a
    shift and std 1, stays in the configuration. Comparisons, RLOO's and GRPO's advantages do not see a shift.
    The head is rounded to its own dtype once.

    Args:
        model: a reward model whose configuration holds a normalisation.

    Returns:
        What is left in the configuration: None if nothing.

    Raises:
        ValueError: there is nothing to fold, or the model does not end in one linear map to one output.
    """
    normalization = reward_normalization(model)
    if normalization is None:
        raise ValueError("`model` must have a reward normalisation to fold; see ummrm.set_reward_normalization.")
    weight, bias = _head(model)
    weight.copy_(weight.cpu().double() / normalization.std)
    left = None
    if bias is not None:
        bias.copy_((bias.cpu().double() - normalization.mean) / normalization.std)
    elif normalization.mean != 0:
        left = RewardNormalization(normalization.mean / normalization.std, 1.0)
    set_reward_normalization(model, left)
    return left


def _head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head; of a mixture whose experts have heads of their own, all of them."""
    heads = [model.get_submodule(name) for name in maps_to_one(model)]
    if len(heads) != 1:
        raise ValueError(
            f"`model` must end in one nn.Linear to one output beside its backbone, and {type(model).__name__} has "
            f"{len(heads)}; keep the normalisation in the configuration and use ummrm.score(..., normalized=True). "
            "Fold adapters first (merge_and_unload)."
        )
    head: Any = heads[0]
    return (head.weight, head.bias) if isinstance(head, nn.Linear) else (head.expert_weight, head.expert_bias)
