"""From scores of whole answers to the advantages of their tokens: per-token rewards, GAE, whitening.

Plain functions of tensors; positions are those of a rollout's mask, whose live ones are contiguous in each row.
"""

from __future__ import annotations

import torch


def token_rewards(scores: torch.Tensor, penalty: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards of tokens: minus the penalty at each, plus the answer's score at the last (Stiennon et al. 2020).

    Args:
        scores: [N].
        penalty: [N, T], e.g. beta times the log-ratio of the chosen token.
        mask: bool [N, T], at least one live position in every row.

    Returns:
        [N, T], 0 outside the mask.

    Raises:
        ValueError: a row has no live position.
    """
    if not bool(mask.any(1).all()):
        raise ValueError("`mask` must have a live position in every row: the score has no token to go to.")
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    rewards = (-penalty).masked_fill(~mask, 0.0)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, discount: float, decay: float) -> torch.Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    With delta_t = r_t + discount * V_(t+1) - V_t, where V is 0 after a row's last live position:
    A_t = sum over l of (discount * decay)^l delta_(t+l).

    Args:
        rewards: [N, T].
        values: [N, T], the value of the state in which token t is chosen.
        mask: bool [N, T], live positions contiguous in each row.
        discount: gamma.
        decay: lambda: 0 gives the one-step error, 1 the discounted return less the value.

    Returns:
        [N, T], 0 outside the mask.
    """
    live = mask.to(rewards.dtype)
    advantages = torch.zeros_like(rewards)
    following_value = following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * following_value - values[:, t]
        following = (delta + discount * decay * following) * live[:, t]
        advantages[:, t] = following
        following_value = values[:, t] * live[:, t]
    return advantages


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shifts and scales live values to mean 0 and variance 1; equal ones become 0.

    Args:
        values: [N, T].
        mask: bool [N, T].

    Returns:
        [N, T], 0 outside the mask.
    """
    live = values[mask]
    # rounding noise of values that are equal but for it must not be blown up to variance 1
    floor = 100 * torch.finfo(live.dtype).eps * live.abs().max() + torch.finfo(live.dtype).tiny
    return ((values - live.mean()) / live.std(correction=0).clamp_min(floor)).masked_fill(~mask, 0.0)
