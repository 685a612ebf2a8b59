"""Which tile a grouped GEMM runs with: a table that depends on shapes, dtype and architecture alone, so that the same
call always sums in the same order.

`candidates` is the pruned list that a tuning program measures; `choose` takes what such a program has written to
TUNED, the file beside this one that is read on import, and else a rule of thumb. The rule has been checked to compile
without spills for every architecture named here, and its speed has not been measured on any.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .launch import INTERPRETED, Target, power_of_2

TUNED = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class Configuration:
    """Tile of the result, tile of the reduction, and how a program is run. `group` rows of tiles are walked column by
    column, so that the L2 cache holds what neighbours share."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8


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
        Configuration(64, 64, 16, 8, 3),
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
    4: Configuration(64, 64, 16, 8, 3),
    8: Configuration(16, 32, 16, 4, 2),
}
KINDS = ("rows", "transposed_rows", "wgrad")


def _family(arch: str) -> str:
    if arch.startswith("sm_"):
        number = int(arch.removeprefix("sm_"))
        if number in (80, 90):
            return arch
        return "sm_100" if 100 <= number < 120 else "sm_86"  # 86, 89 and 120 have 99 KB of shared memory
    return "gfx9" if arch.startswith("gfx") else arch


def _unaligned(arch: str, dtype: torch.dtype) -> Configuration:
    if arch.startswith("sm_"):
        return _UNALIGNED[dtype.itemsize]
    return replace(min(candidates(arch, dtype), key=lambda c: (c.block_m, c.block_n)), stages=1)


def candidates(arch: str, dtype: torch.dtype) -> tuple[Configuration, ...]:
    """The configurations that may serve `dtype` on `arch`, the largest tile first."""
    family, size = _family(arch), dtype.itemsize
    return _TABLE[("nvidia", size) if family.startswith("sm_") and size > 2 else (family, size)]


def key(kind: str, arch: str, dtype: torch.dtype, rows: int, m: int, n: int, k: int) -> str:
    """Under which a tuned choice is kept. `rows` of an average group counts by its power of two."""
    return f"{arch} {kind} {str(dtype).removeprefix('torch.')} {power_of_2(rows)} {m}x{n}x{k}"


def read_tuned(path: Path = TUNED) -> dict[str, Configuration]:
    """What a tuning program measured and wrote, by key; nothing if there is no such file."""
    if INTERPRETED or not path.is_file():
        return {}
    return {name: Configuration(**fields) for name, fields in json.loads(path.read_text()).items()}


def write_tuned(chosen: dict[str, Configuration], path: Path = TUNED) -> None:
    fields = {name: asdict(configuration) for name, configuration in sorted(chosen.items())}
    path.write_text(json.dumps(fields, indent=1) + "\n")


_tuned = read_tuned()


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
        return _unaligned(target.arch, dtype)
    fitting = [c for c in table if c.block_m <= height and c.block_n <= power_of_2(n)]
    return fitting[0] if fitting else min(table, key=lambda c: (c.block_m, c.block_n))
