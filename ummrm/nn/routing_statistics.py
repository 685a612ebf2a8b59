"""Measuring how a network's routers use their experts, over as many forwards as the caller runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .router import Router, in_backward
from .upcycled_ffn import UpcycledFFN, upcycled_ffns


class RoutingStatistics:
    """Routing statistics summed over forwards; every view is a dict from FFN name to a CPU tensor in fp64.

    A recomputation by activation checkpointing is not counted.
    """

    def __init__(self, ffns: dict[str, UpcycledFFN]) -> None:
        self._experts = {name: ffn.config.num_experts for name, ffn in ffns.items()}
        self._slots = {name: torch.zeros(e, dtype=torch.float64) for name, e in self._experts.items()}
        self._gates = {name: torch.zeros(e, dtype=torch.float64) for name, e in self._experts.items()}
        self._shared = dict.fromkeys(ffns, 0.0)
        self._tokens = dict.fromkeys(ffns, 0)

    def add(self, name: str, routing) -> None:
        """Counts one forward's routing (an `ops.RouteOutput`) of the FFN `name`; masked tokens are left out."""
        indices = routing.expert_indices.detach()
        live = indices[:, 0] >= 0
        gates = routing.routed_weights.detach().double()
        experts = self._experts[name]
        flat, weights = indices[live].flatten().long(), gates[live].flatten()
        self._slots[name] += torch.bincount(flat, minlength=experts).double().cpu()
        self._gates[name] += torch.bincount(flat, weights=weights, minlength=experts).cpu()
        self._shared[name] += routing.shared_weight.detach().double()[live].sum().item()
        self._tokens[name] += int(live.sum())

    @property
    def tokens(self) -> dict[str, int]:
        """Live tokens seen by each FFN."""
        return dict(self._tokens)

    @property
    def fractions(self) -> dict[str, torch.Tensor]:
        """[E], each expert's share of the slots; sums to 1 (zeros if no token was live)."""
        return {name: slots / slots.sum().clamp_min(1) for name, slots in self._slots.items()}

    @property
    def gate_shares(self) -> dict[str, torch.Tensor]:
        """[E], each expert's share of the routed gate weight; sums to 1 (uniform if there was none)."""
        return {
            name: gates / gates.sum() if gates.sum() > 0 else torch.full_like(gates, 1 / len(gates))
            for name, gates in self._gates.items()
        }

    @property
    def shared_weight(self) -> dict[str, float]:
        """Mean gate weight of the shared experts over live tokens (0.0 without any)."""
        return {name: total / max(self._tokens[name], 1) for name, total in self._shared.items()}


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
    ffns = upcycled_ffns(model)
    if not ffns:
        raise TypeError(
            f"`model` must hold UpcycledFFN modules, got a {type(model).__name__} with none; "
            "statistics is measured before ummrm.prepare_merge, on the upcycled model."
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
