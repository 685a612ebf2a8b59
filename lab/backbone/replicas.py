"""Linear maps and FFNs of many small models side by side: every tensor has a leading dimension R, one entry a replica.

A replica is one seed at one learning rate. An expert tensor has two leading dimensions, [R, E, ...]: its replica's rows
are then grouped by expert, whole sequences each, as assignment by sequence does. Nothing here mixes replicas, so that
a replica's result doesn't depend on which others stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ummrm import ops

Parameters = dict[str, Tensor]
"""Parameters by name, [R, ...], or [R, E, ...] those of experts."""


@dataclass(frozen=True)
class FFN:
    """Names of an FFN's parameters, by which it becomes experts.

    Attributes:
        up: [2I, H] if `glu` (gate rows first), else [I, H].
        down: [H, I].
        up_bias: [2I or I], or None.
        down_bias: [H], or None.
        activation: as in `ummrm.ops.activation`.
        glu: gated or plain.
    """

    up: str
    down: str
    up_bias: str | None = None
    down_bias: str | None = None
    activation: str = "silu"
    glu: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(n for n in (self.up, self.down, self.up_bias, self.down_bias) if n is not None)


@dataclass(frozen=True)
class Groups:
    """How each replica's batch is shared out among experts.

    Attributes:
        sizes: sequences of each expert, in order, the same for all replicas; empty where there are no experts.
        shared_weight: weight of an always-on shared expert (`shared_name`), the routed one's being the rest.
    """

    sizes: tuple[int, ...] = ()
    shared_weight: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether all experts get as many."""
        return len(set(self.sizes)) <= 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: Groups | None = None) -> Tensor:
    """Multiplies each replica's rows by its weight, or each expert's rows by its own.

    One batched product where all groups are equal, which is faster here than a grouped one (11 against 14 ms forward and
    backward for 32 replicas of 480 rows); `ummrm.ops.grouped_linear` where they aren't.

    Args:
        x: [R, N, D].
        weight: [R, O, D], or [R, E, O, D] of experts.
        bias: [R, O] or [R, E, O], or None.
        groups: of experts, how the N rows (a multiple of the sequences) are split; None: equally.

    Returns:
        [R, N, O].
    """
    if weight.dim() == 3:
        return _product(x, weight, bias)
    replicas, experts = weight.shape[:2]
    flat = weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1)
    if groups is None or groups.equal:
        return _product(x.reshape(replicas * experts, -1, x.shape[-1]), *flat).view(*x.shape[:2], -1)
    each = x.shape[1] // sum(groups.sizes)  # rows a sequence
    sizes = torch.tensor(groups.sizes) * each
    offsets = torch.cat([sizes.new_zeros(1), sizes.repeat(replicas).cumsum(0)]).int()
    return ops.grouped_linear(x.reshape(-1, x.shape[-1]), flat[0], offsets, flat[1]).view(*x.shape[:2], -1)


def ffn(parameters: Mapping[str, Tensor], names: FFN, x: Tensor, groups: Groups | None = None) -> Tensor:
    """`down(act(up(x)))` of each replica, or of each expert on its own rows, mixed with a shared expert's if there is one.

    Args:
        parameters: with those that `names` names.
        names: the FFN.
        x: [R, N, H].
        groups: as in `linear`.

    Returns:
        [R, N, H].
    """

    def one(of: Callable[[str], str]) -> Tensor:
        up_bias, down_bias = (None if n is None else parameters[of(n)] for n in (names.up_bias, names.down_bias))
        pre = linear(x, parameters[of(names.up)], up_bias, groups)
        hidden = ops.activation(pre.view(-1, pre.shape[-1]), names.activation, names.glu).view(*x.shape[:2], -1)
        return linear(hidden, parameters[of(names.down)], down_bias, groups)

    routed = one(str)
    if groups is None or not groups.shared_weight:
        return routed
    return groups.shared_weight * one(shared_name) + (1 - groups.shared_weight) * routed


def shared_name(name: str) -> str:
    """The name of the shared expert's parameter beside the routed experts' of that name."""
    return f"shared.{name}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`transformers`' RMSNorm of [R, ..., D] with weights [R, D]."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight.view(weight.shape[0], *[1] * (x.dim() - 2), -1) * (x * scale)


def select(parameters: Mapping[str, Tensor], index: Tensor) -> Parameters:
    """The replicas that `index` names, copies."""
    return {name: value[index] for name, value in parameters.items()}


def stack(parts: list[Parameters]) -> Parameters:
    """The replicas of all `parts`, one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def member(parameters: Mapping[str, Tensor], experts: tuple[str, ...], index: int) -> Parameters:
    """The dense models that expert `index` is of: its tensors beside those that all members share."""
    return {name: value[:, index].clone() if name in experts else value for name, value in parameters.items()}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
