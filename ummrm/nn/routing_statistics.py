"""Measuring how a network's routers use their experts, over as many forwards as the caller runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .. import ops
from .device_sum import DeviceSum, widest
from .router import Router, in_backward
from .upcycled_ffn import UpcycledFFN, upcycled_ffns


class RoutingStatistics:
    """Routing statistics summed over forwards; every view is a dict from FFN name to a CPU tensor in fp64.

    The sums stay on the model's device: a view waits for it, a forward does not. A recomputation by activation
    checkpointing is not counted.
    """

    def __init__(self, ffns: dict[str, UpcycledFFN]) -> None:
        self._experts = {name: ffn.config.num_experts for name, ffn in ffns.items()}
        self._sums = {name: DeviceSum() for name in ffns}  # of slots [E], gate weights [E], shared weight, tokens

    def add(self, name: str, routing: ops.RouteOutput) -> None:
        """Counts one forward's routing of the FFN `name`; masked tokens are left out."""
        indices, wide = routing.expert_indices, widest(routing.expert_indices.device)
        live = indices[:, 0] >= 0
        # Not index_add or bincount: those add in no fixed order or wait for the device. A masked token, whose indices
        # are -1, has weights 0.
        gates = torch.zeros(len(indices), self._experts[name], dtype=wide, device=indices.device)
        gates.scatter_(1, indices.clamp_min(0).long(), routing.routed_weights.detach().to(wide))
        shared = routing.shared_weight.detach().to(wide) * live
        counts = torch.stack([shared.sum(), live.sum().to(wide)])
        self._sums[name].add(torch.cat([routing.tokens_per_expert.to(wide), gates.sum(0), counts]))

    def _read(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        experts = self._experts[name]
        numbers = self._sums[name].read() or [0.0] * (2 * experts + 2)
        slots, gates = torch.tensor(numbers[:-2], dtype=torch.float64).split(experts)
        return slots, gates, numbers[-2], int(numbers[-1])

    @property
    def tokens(self) -> dict[str, int]:
        """Live tokens seen by each FFN."""
        return {name: self._read(name)[3] for name in self._sums}

    @property
    def fractions(self) -> dict[str, torch.Tensor]:
        """[E], each expert's share of the slots; sums to 1 (zeros if no token was live)."""
        slots = {name: self._read(name)[0] for name in self._sums}
        return {name: counts / counts.sum().clamp_min(1) for name, counts in slots.items()}

    @property
    def gate_shares(self) -> dict[str, torch.Tensor]:
        """[E], each expert's share of the routed gate weight; sums to 1 (uniform if there was none)."""
        gates = {name: self._read(name)[1] for name in self._sums}
        return {
            name: weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))
            for name, weights in gates.items()
        }

    @property
    def shared_weight(self) -> dict[str, float]:
        """Mean gate weight of the shared experts over live tokens (0.0 without any)."""
        read = {name: self._read(name) for name in self._sums}
        return {name: shared / max(tokens, 1) for name, (_, _, shared, tokens) in read.items()}


@contextmanager
def record_routing_statistics(model: nn.Module) -> Iterator[RoutingStatistics]:
    """Records routing statistics of every forward inside the `with` block.

    Args:
        model: a network with `UpcycledFFN` modules.

    Yields:
        The `RoutingStatistics` that fills up.

    Raises:
        TypeError: the network holds no `UpcycledFFN`.
    """
    ffns = {name: ffn for name, ffn in upcycled_ffns(model).items() if ffn.router is not None}
    if not ffns:
        raise TypeError(
            f"`model` must hold UpcycledFFN modules with routers, got a {type(model).__name__} with none; "
            "statistics are measured before ummrm.prepare_merge, on the upcycled model."
        )
    statistics = RoutingStatistics(ffns)

    def hook_for(name: str):
        def hook(router: Router, args, output) -> None:
            if not in_backward():
                statistics.add(name, output)

        return hook

    handles = [ffn.router.register_forward_hook(hook_for(name)) for name, ffn in ffns.items()]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
