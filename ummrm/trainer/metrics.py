"""What the trainers log beyond TRL: sums that are kept on the device between logs and read once a log."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.losses import RoutingReport


def layer_label(name: str, ordinal: int) -> str:
    """`layer_3` for an FFN called `model.layers.3.mlp`; the ordinal where a name has no number of its own."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return f"layer_{numbers[0] if len(numbers) == 1 else ordinal}"


class RoutingMetrics:
    """Routing of the batches since the last `flush`, layer by layer, weighted by live tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}

    def add(self, reports: dict[str, RoutingReport]) -> None:
        """Counts one batch's reports (already summed over processes)."""
        for name, report in reports.items():
            live = report.live_tokens
            quantities = {
                "aux_loss": report.loss.detach() * live,
                "load_balancing_loss": report.load_balancing * live,
                "z_loss": report.z * live,
                "shared_weight": report.shared_weight * live,
                "fractions": report.fractions * live,
                "live": live,
            }
            sums = self._sums.setdefault(name, {})
            for key, value in quantities.items():
                sums[key] = sums[key] + value if key in sums else value

    def flush(self, per_layer: bool) -> dict[str, float]:
        """Means since the last flush, over layers and, if asked for, of each layer; empty if there was no batch.

        `max_expert_share` is the busiest expert's share of the slots (1/E when balanced), `expert_entropy` the entropy
        of the shares divided by log E (1 when balanced, and for one expert).
        """
        layers = {}
        for ordinal, (name, sums) in enumerate(self._sums.items()):
            live = sums["live"].clamp_min(1)
            shares = (sums["fractions"] / live).cpu()
            values = {key: (sums[key] / live).item() for key in sums if key not in ("fractions", "live")}
            values["max_expert_share"] = shares.max().item()
            values["expert_entropy"] = normalized_entropy(shares)
            layers[layer_label(name, ordinal)] = values
        self._sums.clear()
        return averaged(layers, per_layer)


class RewardSpread:
    """Standard deviation of the rewards since the last `flush`, over all processes."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, rewards: Tensor) -> None:
        """Counts one batch's rewards, any shape."""
        rewards = rewards.detach().float().cpu().double()
        self._sums += torch.stack([torch.tensor(rewards.numel()).double(), rewards.sum(), rewards.square().sum()])

    def flush(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`std_reward`, the population standard deviation; empty if there was no batch."""
        count, total, squares = reduce(self._sums).tolist()
        self._sums = torch.zeros(3, dtype=torch.float64)
        return {"std_reward": max(squares / count - (total / count) ** 2, 0.0) ** 0.5} if count else {}


def normalized_entropy(shares: Tensor) -> float:
    """Entropy of non-negative shares [E] that sum to one, divided by log E: 1 when even, 0 when one has all."""
    if shares.numel() == 1:
        return 1.0
    entropy = -torch.special.xlogy(shares, shares).sum() / torch.tensor(float(shares.numel())).log()
    return entropy.item() + 0.0


def averaged(layers: dict[str, dict[str, float]], per_layer: bool) -> dict[str, float]:
    """`key` as the mean over layers, and `key/layer` for each layer if `per_layer`."""
    if not layers:
        return {}
    keys = next(iter(layers.values())).keys()
    out = {key: sum(values[key] for values in layers.values()) / len(layers) for key in keys}
    if per_layer:
        out |= {f"{key}/{layer}": values[key] for key in keys for layer, values in layers.items()}
    return out
