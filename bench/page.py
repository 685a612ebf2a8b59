"""Fills the tables of a page from the records kept in bench/results, so that no measured number is copied by hand.

    python -m bench.page docs/benchmarks.md

A table stands between `<!-- bench TABLE SUITES RECORDS -->` and `<!-- end -->`. TABLE is one of `TABLES`, SUITES are
names joined by commas, RECORDS files below bench/results. After ` | ` may come `COLUMN: a; b`, the cells by which rows
are kept, and `columns: a; b`, the columns to show.
"""

import re
import sys
from pathlib import Path

from .record import OURS, RESULTS, load
from .targets import Entries, of_peak, seconds

_BLOCK = re.compile(r"(<!-- bench (\S+) (\S+) ([^|\n]+?)((?: \| [^\n]*?)?) -->\n)(.*?)(<!-- end -->)", re.S)
_OPENING = re.compile(r"<!-- bench ")


def _where(entry):
    """The cells that say what a row is of."""
    sizes = entry["sizes"]
    shape = ", ".join(f"{name.upper()}={sizes[name]}" for name in "thiek" if name in sizes)
    routing = sizes.get("routing", "balanced")
    return {"sizes": shape, "routing": routing, "direction": entry["direction"], "dtype": entry["dtype"]}


def _share(value, *entries):
    """A ratio, and the noise of what it is made of where that was measured."""
    noise = sum(e["noise"] for e in entries) if all("noise" in e for e in entries) else None
    return f"{value:.2f}" + ("" if noise is None else f" ± {value * noise:.2f}")


def _cases(record, suites):
    """Entries by label, case by case."""
    cases = {}
    for entry in record["entries"]:
        if entry["suite"] in suites:
            cases.setdefault(Entries.case(entry), {})[entry["label"]] = entry
    return [found for found in cases.values() if found.get(OURS, {}).get("outcome") == "measured"]


def ratios(suites, record):
    """The others' times over ummrm's, a row a case: above 1, ummrm is faster."""
    rows = []
    for found in _cases(record, suites):
        ours = found[OURS]
        row = {"operator": ours["suite"], **_where(ours), "ummrm, ms": f"{1e3 * seconds(ours):.3g}"}
        for label, entry in found.items():
            if label != OURS:
                measured = entry["outcome"] == "measured"
                row[label] = _share(seconds(entry) / seconds(ours), ours, entry) if measured else entry["outcome"]
        rows.append(row)
    return rows


def memory(suites, record):
    """ummrm's activation memory over the others', a row a case: below 1, ummrm keeps less."""
    rows = []
    for found in _cases(record, suites):
        others = {n: e["held_bytes"] for n, e in found.items() if n != OURS and e.get("held_bytes", 0) > 0}
        if others:
            ours = found[OURS]
            shares = {label: f"{ours['held_bytes'] / held:.2f}" for label, held in others.items()}
            rows.append({"operator": ours["suite"], **_where(ours), **shares})
    return rows


def peaks(suites, *records):
    """ummrm's share of the copy bandwidth, or of the mm rate, of the same run; a row a case, a column a record."""
    rows = {}
    for record in records:
        for found in _cases(record, suites):
            ours = found[OURS]
            row = rows.setdefault(Entries.case(ours), {"operator": ours["suite"], **_where(ours)})
            share = of_peak(ours, record["about"]["rates"])
            row[record["file"]] = "" if share is None else _share(share, ours)
    return list(rows.values())


def cells(suites, *records):
    """The rows that a program made itself (`bench.program`); those of the second record below those of the first."""
    return [e["cells"] for record in records for e in record["entries"] if e["suite"] in suites]


TABLES = {"ratios": ratios, "memory": memory, "peaks": peaks, "cells": cells}


def _markdown(rows, wishes):
    """Rows as a Markdown table, those and the columns that are wished for.

    Raises:
        ValueError: there is no such column, or no such cell in it.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    where = {}
    for wish in wishes.split(" | ")[1:]:
        name, _, cells = wish.partition(": ")
        where[name] = [cell.strip() for cell in cells.split(";")]
    columns = where.pop("columns", names)
    for name in (*columns, *where):
        if name not in names:
            raise ValueError(f"the table has the columns {'; '.join(names)}, got {name!r}.")
    for name, cells in where.items():
        have = dict.fromkeys(row.get(name) for row in rows)
        for cell in cells:
            if cell not in have:
                raise ValueError(f"the column {name!r} has the cells {'; '.join(map(str, have))}, got {cell!r}.")
        rows = [row for row in rows if row.get(name) in cells]
    lines = [
        columns,
        ["---", *["---:"] * (len(columns) - 1)],
        *[[row.get(name, "") for name in columns] for row in rows],
    ]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def filled(text, results=RESULTS):
    """`text` with all its tables made again.

    Raises:
        ValueError: a table has no `<!-- end -->`, or asks for what there is not.
    """

    def table(match):
        opening, name, suites, files, wishes, _, closing = match.groups()
        if name not in TABLES:
            raise ValueError(f"a table must be one of {', '.join(TABLES)}, got {name!r}.")
        records = [load(results / file) | {"file": Path(file).stem} for file in files.split()]
        rows = TABLES[name](suites.split(","), *records)
        if not rows:
            raise ValueError(f"{files} must hold measured entries of {suites}, and has none.")
        return opening + _markdown(rows, wishes) + closing

    if len(_BLOCK.findall(text)) != len(_OPENING.findall(text)):
        raise ValueError("every `<!-- bench TABLE SUITES RECORDS -->` needs an `<!-- end -->` of its own.")
    return _BLOCK.sub(table, text)


def main():
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
