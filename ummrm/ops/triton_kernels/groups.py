"""What the grouped GEMMs share: the rows that groups read, in order or gathered by an index, and the walk of
programs over all groups' tiles. Groups are the shared experts, the routed ones, and last the rows of no expert; how
long they are is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_rows


@dataclass(frozen=True)
class Rows:
    """One operand's rows, contiguous.

    Attributes:
        shared: [T, width], which every shared expert reads, or [S*T, width], a block for each.
        routed: [T*K, width], sorted by expert; with `index` [T, width], of which sorted row r is
            `routed[index[r] // top_k]`: so a permuted copy is never made.
        index: `sorted_to_slot`, int32 [T*K], or None.
        top_k: K; of no meaning without `index`.
    """

    shared: Tensor
    routed: Tensor
    index: Tensor | None = None
    top_k: int = 1

    @property
    def width(self) -> int:
        return self.routed.shape[1]

    @property
    def slots(self) -> int:
        return self.routed.shape[0] if self.index is None else self.index.numel()

    def block(self, num_tokens: int, num_shared: int) -> int:
        """Rows from one shared expert's block to the next: 0 if all read the same."""
        return 0 if self.shared.shape[0] == num_tokens and num_shared != 1 else num_tokens


def gathered(x: Tensor, sorted_to_slot: Tensor, top_k: int) -> Rows:
    """The rows of tokens: shared experts read them in place, routed ones by the routing's index."""
    return Rows(x, x, sorted_to_slot, top_k)


def precision(dtype: torch.dtype) -> str:
    """Of fp32 products; AMD's have no other. torch.get_float32_matmul_precision raises where any program has set the
    precision by torch's newer names, which this one knows beside the older."""
    asked = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked and dtype == torch.float32 else "ieee"


def dense_slices(proj: Tensor) -> Tensor:
    """An expert's projection must be contiguous; the stride from expert to expert is free."""
    return proj if proj.shape[0] == 0 or proj[0].is_contiguous() else proj.contiguous()


def has_descriptors(*projections: Tensor) -> bool:
    """Whether descriptors can be made of every expert's projection: each row of it begins at a multiple of 16 bytes."""
    return all(
        p.numel() == 0
        or all(s * p.element_size() % 16 == 0 for s in (p.shape[-1], p.stride(0)))
        and (p.is_meta or p.data_ptr() % 16 == 0)
        for p in projections
    )


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def check_counts(op: str, routed_rows: Tensor, num_tokens: int) -> None:
    check_rows(op, "num_tokens", num_tokens)
    check_rows(op, "routed_rows", routed_rows.shape[0])


@triton.jit
def group_table(
    expert_offsets,
    num_tokens,
    num_slots,
    columns,
    NUM_SHARED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two
    BLOCK_M: tl.constexpr,
):
    """(first sorted row, rows, tiles, tiles of this and those before) of each group."""
    group = tl.arange(0, GROUPS)
    expert = group - NUM_SHARED
    begins = tl.load(expert_offsets + expert, mask=(expert >= 0) & (expert <= NUM_EXPERTS), other=0)
    ends = tl.load(expert_offsets + expert + 1, mask=(expert >= 0) & (expert < NUM_EXPERTS), other=0)
    ends = tl.where(expert == NUM_EXPERTS, num_slots, ends)
    heights = tl.where(group < NUM_SHARED, num_tokens, ends - begins)
    tiles = (heights + BLOCK_M - 1) // BLOCK_M * columns
    return begins, heights, tiles, tl.cumsum(tiles, 0)


@triton.jit
def place(
    tile, begins, heights, tiles, after, columns, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):
    """(group, its first sorted row, its rows, row of tiles, column of tiles) of a tile: strips of GROUP rows of tiles,
    each walked column by column. A shared expert's first sorted row is 0."""
    g = tl.sum((after <= tile).to(tl.int32), 0)
    here = tl.arange(0, GROUPS) == g
    height = tl.sum(tl.where(here, heights, 0), 0)
    begin = tl.sum(tl.where(here, begins, 0), 0)
    local = tile - tl.sum(tl.where(here, after - tiles, 0), 0)
    strip = local // (GROUP * columns)
    strip_height = tl.minimum((height + BLOCK_M - 1) // BLOCK_M - strip * GROUP, GROUP)
    within = local - strip * GROUP * columns
    return g, begin, height, strip * GROUP + within % strip_height, within // strip_height


@triton.jit
def gathered_rows(index, begin, at, slots, TOP_K: tl.constexpr):
    """Where rows `at` of a group are read: those of its first `slots` by their index, others as they are."""
    slot = tl.load(index + begin + at, mask=at < slots, other=0)
    return tl.where(at < slots, slot // TOP_K, at).to(tl.int64)
