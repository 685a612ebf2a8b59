"""Writes kernels/cuda/expert_tiles_measured.inc: which tile and band of columns each product of an expert layer takes,
by measurement on the GPU at hand. Rows of other GPUs are kept. Rebuild the extension afterwards. Prints how long each
fused product takes over the kernels that it replaces; which are taken stands in kernels/cuda/expert_tiles.h.

    python -m bench.tune --build build/cmake
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels/cuda/expert_tiles_measured.inc"
HEAD = "// Written by bench/tune.py: rows {arch, SMs, product, columns, other, log2 of rows a group, tile, band}.\n"
NOTHING = "// Nothing has been measured yet.\n"
NO_DEVICE = 3  # exit status of the program
# Hidden and expert intermediate size, experts, experts a token; gated, with one shared expert.
LAYERS = ((2048, 8192, 8, 2), (4096, 14336, 8, 2), (1024, 2816, 7, 5), (896, 4864, 7, 5))
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)
GAIN = 0.02  # a smaller lead over the choice without measurement is noise
APART = "_apart"  # behind a fused product's name: the kernels that it replaces
FUSED = ("glu", "glu_backward", "weight_sum")  # `Fusion` of kernels/cuda/expert_tiles.h


@dataclass(frozen=True)
class Timing:
    """One line of the program: a product's sizes, a tile and band, milliseconds."""

    product: str
    columns: int
    other: int
    rows: int
    tile: int
    band: int
    ms: float

    @property
    def key(self):
        return self.product, self.columns, self.other, self.rows.bit_length() - 1


def sizes(layers=LAYERS, tokens=TOKENS):
    """The six products of a gated layer's forward and backward, and the four that may be fused, as lines for the
    program."""
    lines = []
    for hidden, width, experts, top_k in layers:
        for count in tokens:
            groups = f"{count} 1 {experts} {count * top_k}"
            lines += [
                f"forward {groups} {2 * width} {hidden}",
                f"forward {groups} {hidden} {width}",
                f"input_grad {groups} {width} {hidden}",
                f"input_grad {groups} {hidden} {2 * width}",
                f"weight_grad {groups} {hidden} {2 * width}",
                f"weight_grad {groups} {width} {hidden}",
                f"glu {groups} {2 * width} {hidden}",
                f"glu_backward {groups} {width} {hidden}",
                f"weight_sum {groups} {hidden} {2 * width}",
                f"weight_sum {groups} {width} {hidden}",
            ]
    return lines


def parse(output):
    """((arch, multiprocessors, name), timings) of what the program printed."""
    first, *lines = output.strip().split("\n")
    word, arch, sms, name = first.split(maxsplit=3)
    if word != "device":
        raise ValueError(f"the program printed {first!r} where it should name the device")
    timings = []
    for line in lines:
        product, *numbers, ms = line.split()
        timings.append(Timing(product, *map(int, numbers), float(ms)))
    return (int(arch), int(sms), name), timings


def fastest(timings):
    """The best (tile, band) for each key, over all row counts that share it: by the mean of times relative to the best
    of each row count. Where two are within GAIN, the one listed first."""
    relative = {}
    for key in dict.fromkeys(t.key for t in timings):
        for rows in {t.rows for t in timings if t.key == key}:
            same = [t for t in timings if t.key == key and t.rows == rows]
            least = min(t.ms for t in same)
            for t in same:
                relative.setdefault(key, {}).setdefault((t.tile, t.band), []).append(t.ms / least)
    best = {}
    for key, choices in relative.items():
        means = {choice: sum(ratios) / len(ratios) for choice, ratios in choices.items()}
        least = min(means.values())
        best[key] = next(choice for choice, mean in means.items() if mean <= least * (1 + GAIN))
    return best


def fusion_lines(timings):
    """For each fused product and its sizes: the best time, that of what it replaces, and the latter over the former."""
    lines = []
    for name in FUSED:
        for sizes in dict.fromkeys((t.columns, t.other, t.rows) for t in timings if t.product == name):
            both = [
                min((t.ms for t in timings if (t.product, t.columns, t.other, t.rows) == (which, *sizes)), default=None)
                for which in (name, name + APART)
            ]
            if None in both:
                continue
            columns, other, rows = sizes
            ratio = f"{both[0]:.3f} ms, apart {both[1]:.3f} ms: {both[1] / both[0]:.2f}"
            lines.append(f"{name} {columns} x {other}, {rows} rows a group: {ratio}")
    return lines


def table(before, device, best):
    """The file's text: the rows of `best` for this device, and of `before` those for others."""
    arch, sms, name = device
    blocks = re.split(r"(?m)^(?=// on )", before)[1:]
    kept = [block for block in blocks if not re.search(rf"(?m)^{{{arch}, {sms},", block)]
    rows = [
        f"{{{arch}, {sms}, ExpertProduct::{product}, {columns}, {other}, {log2_rows}, {tile}, {band}}},\n"
        for (product, columns, other, log2_rows), (tile, band) in sorted(best.items())
    ]
    blocks = [*kept, f"// on {name}, {sms} multiprocessors, bf16\n{''.join(rows)}"] if rows else kept
    return HEAD + ("".join(blocks) or NOTHING)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build/cmake", help="a CMake build folder with CUTLASS")
    arguments = parser.parse_args()
    program = arguments.build / "ummrm_tune"
    if not program.is_file():
        sys.exit(f"{program} does not exist: build the target ummrm_tune there first (nvcc and CUTLASS are needed)")
    done = subprocess.run([str(program)], input="\n".join(sizes()), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"nothing was measured and the table is as it was: {done.stderr.strip()}")
    device, timings = parse(done.stdout)
    print("\n".join(fusion_lines(timings)))
    best = fastest([t for t in timings if t.product.removesuffix(APART) not in FUSED])
    TABLE.write_text(table(TABLE.read_text(), device, best))
    print(f"{len(timings)} timings on {device[2]}; {len(best)} rows in {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
