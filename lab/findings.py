"""Fills the tables of a page from the studies kept in lab/results, so that no number is copied by hand.

    python -m lab findings docs/findings.md

A table stands between `<!-- table STUDY TABLE ... -->` and `<!-- end -->`. STUDY is a folder of the results, TABLE the
name of a regime or another one of `lab.study_tables`. After ` | ` may come `columns: a; b`, the columns
to show, and `COLUMN: a; b`, the cells by which rows are kept.
"""

import re
from pathlib import Path

from .report import study_tables

RESULTS = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- table (\S+) (\S+)((?: \| [^\n]*?)?) -->\n)(.*?)(<!-- end -->)", re.S)
_OPENING = re.compile(r"<!-- table ")


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with all its tables made again.

    Raises:
        ValueError: a table has no `<!-- end -->`, or asks for what there is not.
    """
    tables = {}

    def table(match: re.Match) -> str:
        opening, study, name, wishes, _, closing = match.groups()
        if study not in tables:
            tables[study] = study_tables(results / study)
        if name not in tables[study]:
            raise ValueError(f"the study {study} has the tables {', '.join(tables[study])}, got {name!r}.")
        where = {}
        for wish in wishes.split(" | ")[1:]:
            column, _, cells = wish.partition(": ")
            where[column] = [cell.strip() for cell in cells.split(";")]
        columns = where.pop("columns", ())
        lines = tables[study][name].select(columns, **where).markdown().splitlines(keepends=True)
        return opening + "".join(line for line in lines if line.startswith("|")) + closing

    if len(_BLOCK.findall(text)) != len(_OPENING.findall(text)):
        raise ValueError("every `<!-- table STUDY TABLE -->` needs an `<!-- end -->` of its own.")
    return _BLOCK.sub(table, text)


def made(text: str) -> str:
    """The tables of `text` that are made of studies; those written by hand are prose."""
    return "".join(match[5] for match in _BLOCK.finditer(text))


def prose(text: str) -> str:
    """`text` without the tables made of studies, comments and code."""
    return re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->|^    [^\n]*$", "", _BLOCK.sub("", text), flags=re.S | re.M)
