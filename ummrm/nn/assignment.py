"""Assignment by sequence: which expert each sequence of a batch goes through, and the rows of each expert.

`draw_groups` says it for a training step, `RowGroups` holds it for one call of a network. What a layer computes with
it is the business of `upcycled_ffn.py` and `upcycled_linear.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UpcycleConfig
from ..ops.library import checking


def draw_groups(num_pairs: int, num_experts: int, *, seed: int, step: int) -> Tensor:
    """The expert of each pair (or single sequence) of an optimiser step's global batch.

    A pure function of its arguments: experts are dealt evenly, so that their numbers of pairs differ by one at most,
    in an order drawn from `seed` and `step`. With fewer pairs than experts, which experts sit out is drawn too. No
    random state is used or changed.

    Args:
        num_pairs: of the whole step: of all micro-batches and processes.
        num_experts: E.
        seed: of the training.
        step: number of the optimiser step.

    Returns:
        int64 [num_pairs] in [0, num_experts), on the CPU. Both answers of a pair belong in its group.

    Raises:
        TypeError: `seed` or `step` is no integer.
        ValueError: no pair or no expert.
    """
    if num_pairs < 1 or num_experts < 1:
        raise ValueError(
            f"`num_pairs` and `num_experts` must be at least 1 to draw groups, got {num_pairs} and {num_experts}."
        )
    generator = torch.Generator("cpu").manual_seed(mixed_seed(seed, step))
    dealt = torch.randperm(num_experts, generator=generator).repeat(-(-num_pairs // num_experts))[:num_pairs]
    return dealt[torch.randperm(num_pairs, generator=generator)]


def mixed_seed(seed: int, step: int) -> int:
    """One seed of two integers (splitmix64): neighbouring seeds and steps must not give streams that meet.

    Raises:
        TypeError: one is no integer.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    seed, step = int(seed), int(step)
    high = seed >> 32  # 0 for a seed of 32 bits
    z, mask = ((seed & (2**32 - 1)) << 32) ^ (step & (2**32 - 1)) ^ (high * 0x9E3779B97F4A7C15), 2**64 - 1
    z &= mask
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


class RowGroups:
    """The expert of each row of a batch, for one call of a network.

    Args:
        groups: integer [rows], the expert of each row; its values are checked on the CPU, and elsewhere under
            `ummrm.check(True)`.
        num_experts: E.
        device: where the network runs; None is where `groups` is.

    Attributes:
        rows: number of rows.
        num_experts: E.
        order: int64 [rows], the rows in ascending order of their groups; None if they are so already.
        inverse: int64 [rows], its inverse.
        row_offsets: int32 [E + 1]: expert e owns the ordered rows from offsets[e] to offsets[e + 1].
        copies: what the rows are, if not 1: so many equal blocks, of which layers that hold no experts need compute one
            alone.
        exact: whether a matrix must have as many rows; else it may have equally many tokens of each row.

    Raises:
        ValueError: `groups` is no vector of integers.
        IndexError: a group is none of the experts.
    """

    def __init__(self, groups: Tensor, num_experts: int, device: torch.device | str | None = None) -> None:
        check_groups(groups, num_experts)
        groups = groups.long()
        self.rows, self.num_experts, self.copies, self.exact = groups.shape[0], num_experts, 1, False
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        if not _is_ascending(groups):
            groups, order = groups.sort(stable=True)
            self.order = order.to(device)
            self.inverse = order.argsort().to(device)
        bounds = torch.arange(num_experts + 1, device=groups.device)
        self.row_offsets = torch.searchsorted(groups, bounds, out_int32=True).to(device)

    @classmethod
    def of_all(cls, rows: int, num_experts: int, device: torch.device | str | None = None) -> RowGroups:
        """A batch repeated for every expert: `rows` rows, E times."""
        all_rows = object.__new__(cls)
        all_rows.rows, all_rows.num_experts, all_rows.copies = rows * num_experts, num_experts, num_experts
        all_rows.order, all_rows.inverse, all_rows.exact = None, None, False
        all_rows.row_offsets = torch.arange(num_experts + 1, dtype=torch.int32, device=device) * rows
        return all_rows

    def ordered(self) -> RowGroups:
        """The same for rows that have been put into `order`."""
        return self if self.order is None else self._with(order=None, inverse=None)

    def of_tokens(self) -> RowGroups:
        """The same where a model that knows the number of its rows may hand tokens of them to a layer."""
        return self._with(exact=False) if self.exact else self

    def as_rows(self) -> RowGroups:
        """The same for rows of which nothing says that some are equal."""
        return self._with(copies=1)

    def _with(self, **changes: Any) -> RowGroups:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **changes)
        return other

    def offsets(self, flat: Tensor) -> Tensor:
        """int32 [E + 1], the offsets of tokens [T, D], equally many of each row.

        Raises:
            ValueError: they are not.
        """
        tokens = flat.shape[0]
        if tokens % max(self.rows, 1) or (tokens > 0 and self.rows == 0):
            raise ValueError(
                f"`groups` must have one expert for each row of the batch, got {self.rows} for {tokens} tokens, which "
                "is no multiple; pass groups=[rows] that fit this batch."
            )
        return self.row_offsets * (tokens // max(self.rows, 1))

    def experts_of(self, flat: Tensor) -> Tensor:
        """int64 [T], the expert of each of tokens [T, D], equally many of each row, as they come."""
        ends = self.offsets(flat)[1:]
        tokens = torch.arange(flat.shape[0], dtype=ends.dtype, device=ends.device)
        experts = torch.searchsorted(ends, tokens, right=True)
        if self.inverse is None or not flat.shape[0]:
            return experts
        return experts.unflatten(0, (self.rows, -1)).index_select(0, self.inverse).flatten(0, 1)

    def __call__(self, grouped: Callable[[Tensor, Tensor], Tensor], flat: Tensor) -> Tensor:
        """Runs a grouped product on rows as they come: [T, D] to [T, N] by `grouped(ordered rows, expert_offsets)`."""
        offsets = self.offsets(flat)
        if self.order is None or self.inverse is None or not flat.shape[0]:
            return grouped(flat, offsets)
        rows = flat.unflatten(0, (self.rows, -1))
        out = grouped(rows.index_select(0, self.order).flatten(0, 1), offsets)
        return out.unflatten(0, (self.rows, -1)).index_select(0, self.inverse).flatten(0, 1)


class MemberRows(RowGroups):
    """All rows of a batch of any size to one expert."""

    def __init__(self, member: int, num_experts: int) -> None:
        self.rows, self.num_experts, self.copies, self.member, self.exact = -1, num_experts, 1, member, False
        self.order = self.inverse = None

    def offsets(self, flat: Tensor) -> Tensor:
        past = torch.arange(self.num_experts + 1, device=flat.device) > self.member
        return past.int() * flat.shape[0]


def check_groups(groups: object, num_experts: int) -> None:
    """Raises ValueError or IndexError unless `groups` is an integer vector, and on the CPU one of experts."""
    integers = isinstance(groups, Tensor) and not groups.is_floating_point() and groups.dtype != torch.bool
    if not isinstance(groups, Tensor) or not integers or groups.dim() != 1:
        got = f"{groups.dtype} {list(groups.shape)}" if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(f"`groups` must be an integer tensor [rows], the expert of each row, got {got}.")
    if torch.compiler.is_compiling() or not groups.numel() or not (groups.device.type == "cpu" or checking()):
        return
    low, high = groups.aminmax()
    if low < 0 or high >= num_experts:
        wrong = int(low) if low < 0 else int(high)
        raise IndexError(f"`groups` must hold experts in [0, {num_experts}), got {wrong}.")


def _is_ascending(groups: Tensor) -> bool:
    """Whether rows need no ordering; where finding out would wait for the device, False."""
    if groups.device.type != "cpu" or torch.compiler.is_compiling():
        return groups.shape[0] < 2
    return bool((groups.diff() >= 0).all())


class BySequence(nn.Module):
    """A module that runs each row of a batch through one of its experts.

    Attributes:
        config: the upcycling configuration.
        groups: what a call without `groups` goes by: set for a network by `assign_groups`, for one call by a model.
        used_groups: what the last forward went by.
    """

    config: UpcycleConfig
    groups: RowGroups | None
    used_groups: RowGroups | None

    def _start_by_sequence(self) -> None:
        self.groups = self.used_groups = None

    def _row_groups(self, groups: RowGroups | None, x: Tensor) -> RowGroups:
        groups = self.groups if groups is None else groups
        if groups is None:
            member = self.config.evaluation
            if self.training:
                raise ValueError(
                    "`groups` must say in training which expert each sequence goes through, got None: pass "
                    "groups=[rows] to a Hugging Face model, or call ummrm.assign_groups(network, groups) before each "
                    "forward (ummrm.draw_groups draws them)."
                )
            if not isinstance(member, int):
                raise ValueError(
                    "evaluation=\"mean\" averages the members' scores after the head, which one layer can't do: name a "
                    "member with ummrm.set_evaluation(network, number), or run each: "
                    "`for _ in ummrm.members(network): network(x)`."
                )
            groups = MemberRows(member, self.config.num_experts)
        if groups.rows >= 0 and (groups.exact or x.dim() > 2) and x.shape[0] != groups.rows:
            raise ValueError(
                f"`groups` must have one expert for each row of the batch, got {groups.rows} for an input of "
                f"{list(x.shape)} to a {type(self).__name__}; give each row its own (of pairs both answers: "
                "groups.repeat(2)), anew for every batch. What is no row of the batch (position embeddings, say) can't "
                'go through experts: use experts_in="ffn".'
            )
        self.used_groups = groups
        return groups


def sequence_modules(network: nn.Module) -> dict[str, BySequence]:
    """The modules of a network that hold experts assigned by sequence, by name, in order."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BySequence) and module.config.by_sequence
    }


@contextlib.contextmanager
def going_by(modules: Iterable[BySequence], groups: RowGroups | None) -> Iterator[None]:
    """What modules go by inside the `with` block; what `assign_groups` has said of them is put back after it."""
    modules = list(modules)
    held = [module.groups for module in modules]
    for module in modules:
        module.groups = groups
    try:
        yield
    finally:
        for module, before in zip(modules, held, strict=True):
            module.groups = before


def _required(network: nn.Module) -> dict[str, BySequence]:
    found = sequence_modules(network)
    if not found:
        raise TypeError(
            f"`network` must hold experts assigned by sequence, got a {type(network).__name__} with none; upcycle it "
            'with UpcycleConfig(assignment="sequence").'
        )
    return found


def assign_groups(network: nn.Module, groups: Tensor | None) -> None:
    """Says which expert each row of the next forwards goes through: the one call a step of a plain training loop.

    It holds until the next call, in evaluation mode too. A Hugging Face model may get `groups=` in its forward instead,
    which goes before.

    Args:
        network: any network with `UpcycledFFN` modules assigned by sequence, called with [rows, ..., H]; a Hugging Face
            model too.
        groups: integer [rows]; ascending ones cost nothing, others an ordering of the rows in every layer. None: none,
            as before the first call.

    Raises:
        TypeError: the network holds no experts assigned by sequence.
        ValueError: `groups` is no vector of integers.
        IndexError: a group is none of the experts.
    """
    modules = _required(network)
    first = next(iter(modules.values()))
    made = None
    if groups is not None:
        device = next(first.parameters()).device
        made = RowGroups(groups, first.config.num_experts, device)
        made.exact = True
    for module in modules.values():
        module.groups = made


def set_evaluation(network: nn.Module, evaluation: str | int) -> None:
    """What forwards without groups compute outside training: the members' mean, or one member.

    Args:
        network: a network with experts assigned by sequence; a Hugging Face model keeps it in its configuration.
        evaluation: `"mean"` or the number of a member.

    Raises:
        TypeError: the network holds no experts assigned by sequence.
        ValueError: `evaluation` is none of these.
    """
    modules = _required(network)
    changed = {id(m.config): dataclasses.replace(m.config, evaluation=evaluation) for m in modules.values()}
    for module in modules.values():
        module.config = changed[id(module.config)]
    config = getattr(network, "config", None)
    if isinstance(getattr(config, "umm", None), dict):
        config.umm = {**config.umm, "evaluation": evaluation}  # type: ignore[union-attr]


def members(network: nn.Module) -> Iterator[int]:
    """Makes each member of a network in turn what its forwards compute, in any mode:

        scores = torch.stack([network(x) for _ in ummrm.members(network)], dim=-1)

    What the network computed before is put back at the end, also of a loop that is left early. For all members' scores
    of a Hugging Face reward model `model.member_scores(**batch)` takes one pass.

    Args:
        network: any network with experts assigned by sequence, a Hugging Face model too.

    Yields:
        The number of the member, from 0.

    Raises:
        TypeError: the network holds no experts assigned by sequence.
    """
    modules = list(_required(network).values())
    for member in range(modules[0].config.num_experts):
        with going_by(modules, MemberRows(member, modules[0].config.num_experts)):
            yield member
