"""What the trainers log beyond TRL: sums that are kept on the device between logs and read once a log."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..nn.device_sum import DeviceSum, read_all, widest
from ..nn.losses import RoutingReport

M = TypeVar("M")


def layer_label(name: str, ordinal: int) -> str:
    """`layer_3` for an FFN called `model.layers.3.mlp`; the ordinal where a name has no number of its own."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return f"layer_{numbers[0] if len(numbers) == 1 else ordinal}"


def labelled(modules: dict[str, M]) -> dict[str, M]:
    """Modules by `layer_label`; where a layer has several, by that and their names below the layer.

    A reward head, which then stands beside them, is in no layer: its name is its label.
    """
    labels = [layer_label(name, ordinal) for ordinal, name in enumerate(modules)]
    if len(set(labels)) < len(labels):
        below = [re.sub(r"^.*?\.\d+\.", "", name) for name in modules]
        labels = [f"{label}/{rest}" for label, rest in zip(labels, below, strict=True)]
        labels = [label if re.search(r"\d", n) else n for label, n in zip(labels, modules, strict=True)]
    return dict(zip(labels, modules.values(), strict=True))


class RoutingMetrics:
    """Routing of the batches since the last `flush`, layer by layer, weighted by live tokens."""

    _MEANS = ("aux_loss", "load_balancing_loss", "z_loss", "shared_weight")

    def __init__(self) -> None:
        self._sums: dict[str, DeviceSum] = {}

    def add(self, reports: dict[str, RoutingReport]) -> None:
        """Counts one batch's reports (already summed over processes)."""
        for name, report in reports.items():
            live = report.live_tokens.to(widest(report.live_tokens.device))
            means = torch.stack([report.loss.detach(), report.load_balancing, report.z, report.shared_weight])
            values = torch.cat([means.to(live), report.fractions.to(live), torch.ones_like(live)[None]]) * live
            self._sums.setdefault(name, DeviceSum()).add(values)

    def flush(self, per_layer: bool) -> dict[str, float]:
        """Means since the last flush, over layers and, if asked for, of each layer; empty if there was no batch.

        `max_expert_share` is the largest share of the slots that one expert gets (1/E when balanced), `expert_entropy`
        the entropy of the shares divided by log E (1 when balanced, and for one expert).
        """
        layers = {}
        for ordinal, (name, sums) in enumerate(zip(self._sums, read_all(list(self._sums.values())), strict=True)):
            *totals, live = sums
            means = [total / max(live, 1.0) for total in totals]
            shares = means[len(self._MEANS) :]
            values = dict(zip(self._MEANS, means, strict=False))
            values |= {"max_expert_share": max(shares), "expert_entropy": normalized_entropy(shares)}
            layers[layer_label(name, ordinal)] = values
        self._sums.clear()
        return averaged(layers, per_layer)


class RewardMetrics:
    """Rewards since the last `flush`, counted one by one, so that batches and processes make no difference."""

    def __init__(self) -> None:
        self._rewards = DeviceSum()  # how many, their sum, the sum of their squares
        self._pairs = DeviceSum()  # how many, those in the right order, the sum of their differences
        self._extremes: Tensor | None = None  # of -reward and of reward

    def add(self, rewards: Tensor) -> None:
        """Counts rewards, any shape."""
        rewards = rewards.detach().to(widest(rewards.device)).flatten()
        count = torch.full_like(rewards.sum(), rewards.numel())
        self._rewards.add(torch.stack([count, rewards.sum(), rewards.square().sum()]))
        if rewards.numel():
            extremes = torch.stack([-rewards.min(), rewards.max()])
            self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)

    def add_pairs(self, pairs: Tensor) -> None:
        """Counts pairs [P, 2], the preferred answer's reward first, and their rewards."""
        difference = pairs.detach().to(widest(pairs.device)).diff(dim=1).neg()
        count = torch.full_like(difference.sum(), len(difference))
        self._pairs.add(torch.stack([count, (difference > 0).sum().to(difference), difference.sum()]))
        self.add(pairs)

    def flush(self, total: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What was counted since the last flush; empty if nothing was.

        Args:
            total: sums a vector over processes.
            largest: its maximum over processes.

        Returns:
            `mean_reward`, `std_reward` (population), `min_reward`, `max_reward`; of pairs `accuracy`, the share whose
            preferred answer has the higher reward, and `margin`, the mean difference.
        """
        rewards = self._rewards.value()
        rewards = torch.zeros(3, dtype=torch.float64) if rewards is None else rewards
        pairs = self._pairs.value()
        sums = total(torch.cat([rewards, torch.zeros_like(rewards) if pairs is None else pairs]))
        extremes = rewards.new_full((2,), -math.inf) if self._extremes is None else self._extremes
        self._rewards, self._pairs, self._extremes = DeviceSum(), DeviceSum(), None
        read = torch.cat([sums, largest(extremes).to(sums)]).tolist()  # waits for the device once
        count, reward, squares, pairs, right, difference, minus_least, most = read
        if not count:
            return {}
        mean = reward / count
        metrics = {
            "min_reward": -minus_least,
            "mean_reward": mean,
            "max_reward": most,
            "std_reward": max(squares / count - mean**2, 0.0) ** 0.5,
        }
        return metrics | ({"accuracy": right / pairs, "margin": difference / pairs} if pairs else {})


def normalized_entropy(shares: Sequence[float]) -> float:
    """Entropy of E non-negative shares that sum to one, divided by log E: 1 when even, 0 when one has all."""
    if len(shares) == 1:
        return 1.0
    return -sum(share * math.log(share) for share in shares if share != 0) / math.log(len(shares)) + 0.0


def averaged(layers: dict[str, dict[str, float]], per_layer: bool) -> dict[str, float]:
    """`key` as the mean over layers, and `key/layer` for each layer if `per_layer`."""
    if not layers:
        return {}
    keys = next(iter(layers.values())).keys()
    out = {key: sum(values[key] for values in layers.values()) / len(layers) for key in keys}
    if per_layer:
        out |= {f"{key}/{layer}": values[key] for key in keys for layer, values in layers.items()}
    return out
