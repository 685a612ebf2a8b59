"""Which tile a grouped GEMM runs with: a table that depends on shapes, dtype and architecture alone, so that the same
call always sums in the same order.

`candidates` is the pruned list that a tuning program measures; `choose` takes what such a program has written to
TUNED, the file beside this one that is read on import, and else a rule of thumb. The rule has been checked to compile
without spills for every architecture named here, and its speed has not been measured on any.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .launch import INTERPRETED, Target, power_of_2

TUNED = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class Configuration:
    """Tile of the result, tile of the reduction, and how a program is run. `group` rows of tiles are walked column by
    column, so that the L2 cache holds what neighbours share. `tma`: projections are read through descriptors, where
    they lie at multiples of 16 bytes; the sums are the same."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False

    def constants(self) -> dict[str, int]:
        """As a kernel takes them, by name."""
        tile = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": self.group}
        return tile | {"num_warps": self.warps, "num_stages": self.stages}


# By family of architectures and size of the element in bytes, the largest tile first. What is missing spills: on sm_80
# and sm_100 128 x 256 with 8 warps and 128 x 128 with 4. A tile of fp32 without TF32 is all registers on NVIDIA,
# whose tensor cores have no such product. On AMD 2 stages are the fewest that load ahead, and take no more
# shared memory than 1.
_SMALL = (Configuration(64, 64, 64, 4, 3), Configuration(32, 64, 64, 4, 3), Configuration(16, 64, 64, 4, 3))
_TABLE = {
    ("sm_80", 2): (
        Configuration(128, 128, 64, 8, 3),
        Configuration(64, 128, 64, 4, 3),
        *_SMALL,
    ),
    ("sm_86", 2): (Configuration(128, 128, 32, 8, 3), Configuration(64, 128, 32, 4, 3), *_SMALL),
    ("sm_90", 2): (
        Configuration(128, 256, 64, 8, 3),
        Configuration(128, 128, 64, 8, 4),
        Configuration(128, 128, 64, 4, 4),
        Configuration(64, 128, 64, 4, 4),
        *_SMALL,
    ),
    ("sm_100", 2): (
        Configuration(128, 128, 64, 8, 4),
        Configuration(64, 128, 64, 4, 4),
        *_SMALL,
    ),
    ("gfx9", 2): (
        Configuration(128, 256, 64, 8, 2),
        Configuration(128, 128, 64, 4, 2),
        Configuration(64, 128, 64, 4, 2),
        Configuration(64, 64, 64, 4, 2),
        Configuration(32, 64, 64, 4, 2),
        Configuration(16, 64, 64, 4, 2),
    ),
    ("nvidia", 4): (
        Configuration(64, 64, 16, 8, 2),
        Configuration(16, 64, 32, 4, 3),
    ),
    ("gfx9", 4): (Configuration(64, 64, 32, 4, 2), Configuration(32, 64, 32, 4, 2), Configuration(16, 64, 32, 4, 2)),
    ("nvidia", 8): (Configuration(32, 32, 16, 4, 2), Configuration(16, 32, 16, 4, 2)),
    ("gfx9", 8): (Configuration(32, 32, 16, 4, 2), Configuration(16, 32, 16, 4, 2)),
    # Few large numpy products instead of many small ones; masks still meet sizes that divide nothing.
    ("interpreter", 2): (Configuration(32, 32, 32, 1, 1, 2),),
    ("interpreter", 4): (Configuration(32, 32, 32, 1, 1, 2),),
    ("interpreter", 8): (Configuration(32, 32, 32, 1, 1, 2),),
}
# Sizes that are no multiple of 16 are read element by element, each with its address in registers. On AMD the smallest
# tile serves them, with nothing loaded ahead: in fp32 that spills.
_UNALIGNED = {
    2: Configuration(64, 64, 32, 8, 3),
    4: Configuration(64, 64, 16, 8, 2),  # a weight gradient has 3 stages
    8: Configuration(16, 32, 16, 4, 2),
}
KINDS = ("rows", "transposed_rows", "wgrad")

# Of the up-projection with the activation in its epilogue, by the same keys. Gated it has two accumulators, so its tile
# is half as wide. What is not here is not fused: fp32 without TF32 and fp64 have no registers left. Left out because
# they spill: plain 128 x 256, and with 4 warps 128 x 128 on sm_90 and 64 x 64 on sm_100; gated 128 x 128 on sm_100;
# with the exact GELU, whose erf takes most registers, 128 x 128 gated on sm_90 and plain on sm_80.
_NARROW = (Configuration(128, 64, 64, 8, 4), Configuration(64, 64, 64, 4, 4), Configuration(16, 64, 64, 4, 3))
_GATED = {
    ("sm_80", 2): (Configuration(128, 64, 64, 8, 3), Configuration(64, 64, 64, 4, 3), Configuration(16, 64, 64, 4, 3)),
    ("sm_86", 2): (Configuration(128, 64, 32, 8, 3), Configuration(64, 64, 32, 4, 3), Configuration(16, 64, 64, 4, 3)),
    ("sm_90", 2): (Configuration(128, 128, 64, 8, 3), *_NARROW),
    ("sm_100", 2): (Configuration(128, 64, 64, 8, 4), Configuration(64, 64, 64, 8, 4), Configuration(16, 64, 64, 4, 3)),
    ("gfx9", 2): (
        Configuration(128, 128, 64, 8, 2),
        Configuration(128, 64, 64, 8, 2),
        Configuration(64, 64, 64, 4, 2),
        Configuration(16, 64, 64, 4, 2),
    ),
}
_PLAIN = {
    ("sm_80", 2): _TABLE["sm_80", 2],
    ("sm_86", 2): _TABLE["sm_86", 2],
    ("sm_90", 2): (Configuration(128, 128, 64, 8, 4), Configuration(64, 128, 64, 4, 4), *_SMALL),
    ("sm_100", 2): (
        Configuration(128, 128, 64, 8, 4),
        Configuration(64, 128, 64, 4, 4),
        Configuration(64, 64, 64, 8, 4),
        *_SMALL[1:],
    ),
    ("gfx9", 2): _TABLE["gfx9", 2][1:],
}
for _size in (2, 4, 8):
    _GATED["interpreter", _size] = _PLAIN["interpreter", _size] = _TABLE["interpreter", _size]
FUSED_KINDS = {
    "up_gated": _GATED,
    "up_gated_gelu": _GATED | {("sm_90", 2): _NARROW},
    "up_plain": _PLAIN,
    "up_plain_gelu": _PLAIN | {("sm_80", 2): _TABLE["sm_80", 2][1:]},
}

# Of a processor: 32-bit registers, bytes of shared memory.
RESOURCES = {
    "sm_80": (65536, 167936),
    "sm_86": (65536, 102400),
    "sm_90": (65536, 233472),
    "sm_100": (65536, 233472),
    "gfx9": (131072, 65536),
}
_MOST_PROGRAMS = 8  # more gain nothing beside GEMMs


def _family(arch: str) -> str:
    if arch.startswith("sm_"):
        number = int(arch.removeprefix("sm_"))
        if number in (80, 90):
            return arch
        return "sm_100" if 100 <= number < 120 else "sm_86"  # 86, 89 and 120 have 99 KB of shared memory
    return "gfx9" if arch.startswith("gfx") else arch


def _unaligned(kind: str, arch: str, dtype: torch.dtype) -> Configuration:
    if arch.startswith("sm_"):
        c = _UNALIGNED[dtype.itemsize]
        return replace(c, stages=3) if kind == "wgrad" and dtype.itemsize == 4 else c
    c = replace(min(candidates(arch, dtype), key=lambda c: (c.block_m, c.block_n)), stages=1)
    # with gathered rows a longer reduction of 16-bit types spills scalar registers under Triton 3.9
    return replace(c, block_k=32) if kind == "wgrad" and dtype.itemsize == 2 else c


def candidates(arch: str, dtype: torch.dtype) -> tuple[Configuration, ...]:
    """The configurations that may serve `dtype` on `arch`, the largest tile first."""
    family, size = _family(arch), dtype.itemsize
    return _TABLE[("nvidia", size) if family.startswith("sm_") and size > 2 else (family, size)]


def with_tma(arch: str, table: tuple[Configuration, ...]) -> tuple[Configuration, ...]:
    """What a tuning program tries: beside the table, the same with descriptors, on GPUs that have them. By default
    none is used, since no GPU has shown yet what they gain; they free registers, of a fifth where the projection is
    transposed."""
    if _family(arch) not in ("sm_90", "sm_100"):
        return table
    return *table, *(replace(c, tma=True) for c in table)


def programs(arch: str, dtype: torch.dtype, c: Configuration, accumulators: int = 1) -> int:
    """How many programs of a GEMM a processor holds at a time, by an estimate from above of what one takes.

    Two may then hide each other's latencies, which matters most where a program has few warps; the compile check holds
    the estimate to what the compiler made of it. It decides who computes a tile, never how.
    """
    family = _family(arch)
    if family not in RESOURCES:
        return 1
    registers, shared = RESOURCES[family]
    threads = c.warps * (64 if family == "gfx9" else 32)
    # Accumulators, and as much as addresses and the operands' fragments took at most.
    each = accumulators * c.block_m * c.block_n * max(dtype.itemsize, 4) // 4 // threads + 128
    held = max(c.stages - 1, 1) if family == "gfx9" else c.stages  # AMD's last stage is in registers
    tile = held * (c.block_m + accumulators * c.block_n) * c.block_k * dtype.itemsize
    return max(1, min(registers // (each * threads), shared // tile, _MOST_PROGRAMS))


def key(kind: str, arch: str, dtype: torch.dtype, rows: int, m: int, n: int, k: int) -> str:
    """Under which a tuned choice is kept. `rows` of an average group counts by its power of two."""
    return f"{arch} {kind} {str(dtype).removeprefix('torch.')} {power_of_2(rows)} {m}x{n}x{k}"


def read_tuned(path: Path = TUNED) -> dict[str, Configuration | None]:
    """What a tuning program measured and wrote, by key; nothing if there is no such file. None: not fused."""
    if INTERPRETED or not path.is_file():
        return {}
    chosen = json.loads(path.read_text())
    return {name: None if fields is None else Configuration(**fields) for name, fields in chosen.items()}


def write_tuned(chosen: dict[str, Configuration | None], path: Path = TUNED) -> None:
    """Atomic: a reader at the same time sees the old file or the new one."""
    fields = {name: None if c is None else asdict(c) for name, c in sorted(chosen.items())}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        part = Path(file.name)
        try:
            file.write(json.dumps(fields, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
            part.chmod(0o644)  # a temporary file is its owner's alone
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


_tuned = read_tuned()


def use_tuned(chosen: dict[str, Configuration | None]) -> None:
    """Takes `chosen` in place of what was read, in this process."""
    global _tuned
    _tuned = dict(chosen)


def choose(kind: str, target: Target, dtype: torch.dtype, rows: int, m: int, n: int, k: int) -> Configuration:
    """The configuration for products [m, k] x [k, n], of which `m` (or `k`, in a weight gradient) is a group's rows.

    Args:
        kind: one of KINDS.
        target: the device.
        dtype: of the operands.
        rows: of an average group, known without reading the device.
        m: height of the result; 0 where it is the group's rows.
        n: width of the result.
        k: length of the reduction; 0 where it is the group's rows.
    """
    if (tuned := _tuned.get(key(kind, target.arch, dtype, rows, m, n, k))) is not None:
        return tuned
    table = candidates(target.arch, dtype)
    height = power_of_2(m or rows)
    if any(size % 16 for size in (m, n, k)):
        return _unaligned(kind, target.arch, dtype)
    return _first_fitting(table, height, n)


def fused_candidates(kind: str, arch: str, dtype: torch.dtype) -> tuple[Configuration, ...]:
    """As `candidates`, of the GEMMs with an epilogue; none where no tile of it fits."""
    return FUSED_KINDS[kind].get((_family(arch), dtype.itemsize), ())


def choose_fused(kind: str, target: Target, dtype: torch.dtype, rows: int, n: int, k: int) -> Configuration | None:
    """The configuration of a GEMM with the activation in its epilogue, or None where it and the activation are to be
    launched one after the other: no tile fits the device, sizes are no multiples of 16, or that was measured faster.

    Args:
        kind: one of FUSED_KINDS.
        target: the device.
        dtype: of the operands.
        rows: of an average group, known without reading the device.
        n: width of the activation.
        k: length of the reduction.
    """
    name = key(kind, target.arch, dtype, rows, 0, n, k)
    if name in _tuned:
        return _tuned[name]
    table = fused_candidates(kind, target.arch, dtype)
    if not table or (target.arch != "interpreter" and (n % 16 or k % 16)):
        return None
    return _first_fitting(table, power_of_2(rows), n)


def _first_fitting(table: tuple[Configuration, ...], height: int, n: int) -> Configuration:
    fitting = [c for c in table if c.block_m <= height and c.block_n <= power_of_2(n)]
    return fitting[0] if fitting else min(table, key=lambda c: (c.block_m, c.block_n))
