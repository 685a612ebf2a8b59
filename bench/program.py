"""What programs that time something larger than an operator share: rounds side by side, the record, the printed table.

An entry has its figures, and `cells`, the row of the table that they make; `bench.page` puts such rows on a page.
"""

import json
import time
from pathlib import Path

from . import timing
from .record import RESULTS


def rounds(calls, turns, warm=False):
    """What each call returned, turn by turn: a tuple of seconds, one a part of its work; another one begins each turn.

    Args:
        calls: by label; each runs once and returns such a tuple.
        turns: how many are kept. One more goes first, unkept, so that libraries and allocator have what
            they keep.
        warm: all of them have just run, so that none need go first.
    """
    for call in () if warm else calls.values():
        call()
    found = timing.side_by_side(list(calls.values()), [turns] * len(calls))
    return dict(zip(calls, found, strict=True))


def best(turns):
    """The best of each part over the turns."""
    return [min(part) for part in zip(*turns, strict=True)]


def noise(turns):
    """How far the sum of the parts may be off, as bench.timing says."""
    return timing.noise([[sum(parts)] for parts in turns], min)


def text(record):
    """The entries' cells as a table of plain text, suite by suite, under what they were measured on."""
    about, lines = record["about"], []
    lines.append(f"device {about['device']}, {about['threads']} threads, load average {about['load_average'][0]:.1f}")
    lines.append(f"commit {about['commit']}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    for suite in dict.fromkeys(entry["suite"] for entry in record["entries"]):
        cells = [entry["cells"] for entry in record["entries"] if entry["suite"] == suite]
        names = list(dict.fromkeys(name for row in cells for name in row))
        widths = {n: max(len(n), *(len(row.get(n, "")) for row in cells)) for n in names}
        lines += ["", suite, "  ".join(n.ljust(widths[n]) for n in names)]
        lines += ["  ".join(row.get(n, "").ljust(widths[n]) for n in names) for row in cells]
    return "\n".join(lines)


def arguments(parser):
    """The options that every such program has."""
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; fewer than cores on a shared machine")
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer turns: at most 100 seconds")
    parser.add_argument("--turns", type=int, help="rounds of every contender")
    parser.add_argument("--output", type=Path, help="the file to write; by default one of bench/results")


def write(name, record, threads, output=None):
    """Prints the table and writes the record as JSON; returns the file."""
    print(text(record))
    if output is None:
        commit = record["about"]["commit"][:12]
        output = RESULTS / f"{name}-{threads}threads-{time.strftime('%Y-%m-%d')}-{commit}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {output}")
    return output
