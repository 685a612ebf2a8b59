"""The rows of a source with where each stands: lines of text files, rows of tables, a data set of the hub.

A line that can't be read is a `RowProblem` in the row's place, so that it is counted and named. What a row holds is
`pairs.py`'s business.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .config import DataError, PairSource

LONGEST_LINE = 64 << 20  # bytes of a line that is read
_LARGEST_FIELD = 1 << 28  # of a CSV file; Python's own limit is 128 kB, less than a long conversation


class Place(NamedTuple):
    """Where a row stands.

    Attributes:
        source: the file, or the data set's name.
        number: of its line or row, from 1.
        unit: `line` or `row`.
    """

    source: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" if self.unit == "line" else f"{self.source}, row {self.number}"


class RowProblem(ValueError):
    """A row that makes no pair, or no text to score.

    Attributes:
        kind: one of `report.KINDS`.
        reason: in words.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


Row = tuple[Place, "dict[str, Any] | RowProblem"]


def rows_of(source: PairSource) -> Iterator[Row]:
    """Every row of a source, in order.

    Raises:
        DataError: there is no such file or data set, or a file as a whole can't be read.
    """
    for path in files_of(source):
        try:
            yield from _READERS[_kind(path)](path)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} can't be read: {_line(error)}; mend the file or leave it out.") from error
    if not files_of(source):
        yield from _data_set(source)


def is_table(path: Path) -> bool:
    """Whether a file holds rows in another form than lines of JSON, by its name."""
    return _kind(path) in set(_READERS) - {".jsonl"}


def files_of(source: PairSource) -> list[Path]:
    """The files that a source names, sorted; none where it names a data set (on the hub, or saved in a folder).

    Raises:
        DataError: a pattern or folder without files, a file that is missing or of an unknown kind.
    """
    path = os.path.expanduser(source.path)
    if glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise DataError(f"`path` must be a pattern that fits files, and none fits {source.path!r}.")
    elif os.path.isdir(path):
        if _saved_data_set(Path(path)):
            return []
        found = sorted(file for file in Path(path).iterdir() if file.is_file() and _kind(file) in _READERS)
        if not found:
            raise DataError(
                f"`path` must be a folder with files of {', '.join(_READERS)}, and {source.path!r} has none."
            )
    elif os.path.exists(path) or _kind(Path(path)) in _READERS:
        found = [Path(path)]
        if not os.path.isfile(path):
            what = "is no file" if os.path.exists(path) else "is not there"
            raise DataError(f"`path` must be a file of pairs, and {source.path!r} {what}.")
    else:
        return []
    for file in found:
        if _kind(file) not in _READERS:
            raise DataError(f"`path` must be a file of {', '.join(_READERS)} (text may be .gz), got {str(file)!r}.")
    return found


# ---- files -------------------------------------------------------------------------------------------------------


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes | RowProblem]]:
    """The lines of an open file with their numbers, without a byte order mark; a problem for one of over 64 MB."""
    number = 0
    while True:
        part = file.readline(LONGEST_LINE + 1)
        number += 1
        line: bytes | RowProblem = part.removeprefix(b"\xef\xbb\xbf") if number == 1 else part
        while len(part) > LONGEST_LINE and not part.endswith(b"\n"):
            line = RowProblem("malformed", f"longer than {LONGEST_LINE >> 20} MB")
            part = file.readline(LONGEST_LINE + 1)
        if line == b"" and not part:
            return
        yield number, line


def json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    """The rows of an open file of JSON lines, of which blank ones are none; `name` is said of their places."""
    for number, line in lines_of(file):
        if isinstance(line, RowProblem):
            yield Place(name, number), line
        elif line.strip():
            yield Place(name, number), parsed(line)


def _json_lines(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        yield from json_lines(file, str(path))


def _json(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        content = file.read()
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} must hold JSON: {_line(error)}; of JSON lines the name ends in .jsonl.") from error
    if not isinstance(data, list):
        raise DataError(f"{path} must hold a list of rows, got {named(data)}.")
    for number, row in enumerate(data, 1):
        yield Place(str(path), number, "row"), _mapping(row)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_FIELD)
    with (
        opened(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        reader = csv.reader(text, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        head, line = None, 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Place(str(path), line), RowProblem("malformed", f"no CSV row: {_line(error)}")
                line = reader.line_num + 1
                continue
            if cells is None:
                return
            if head is None:
                head = cells
                if len(set(head)) != len(head):
                    raise DataError(f"{path} must name every column once in its first line, got {', '.join(head)}.")
            elif cells:
                yield Place(str(path), line), _cells(head, cells)
            line = reader.line_num + 1


def _cells(head: list[str], cells: list[str]) -> dict[str, Any] | RowProblem:
    if len(cells) != len(head):
        return RowProblem("malformed", f"{len(cells)} cells, where the first line names {len(head)} columns")
    if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
        return RowProblem("malformed", "not UTF-8")
    return {name: _structured(cell) for name, cell in zip(head, cells, strict=True)}


def _structured(cell: str) -> Any:
    """A list of messages that stands in a cell as JSON; any other cell as it is, an empty one as None."""
    if cell.lstrip().startswith("[{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell or None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(path), number, "row"), row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} must be a Parquet file: {_line(error)}.") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _kind(path: Path) -> str:
    """The suffix that says what a file is."""
    return Path(path.stem).suffix if path.suffix == ".gz" and Path(path.stem).suffix != ".parquet" else path.suffix


def opened(path: Path) -> Any:
    """A file to read bytes of, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def parsed(line: bytes) -> dict[str, Any] | RowProblem:
    """The row in a line of JSON."""
    try:
        return _mapping(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RowProblem("malformed", f"not UTF-8 (byte {error.start + 1})")
    except (ValueError, RecursionError) as error:
        return RowProblem("malformed", f"no JSON: {_line(error)}")


def _mapping(row: Any) -> dict[str, Any] | RowProblem:
    return (
        row if isinstance(row, dict) else RowProblem("malformed", f"must be an object with columns, got {named(row)}")
    )


# ---- data sets ---------------------------------------------------------------------------------------------------


def _saved_data_set(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _data_set(source: PairSource) -> Iterator[Row]:
    import datasets

    folder = Path(os.path.expanduser(source.path))
    try:
        if folder.is_dir():
            found = datasets.load_from_disk(str(folder))
            found = found[source.split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # the hub, the network and a stranger's files raise what they like
        raise DataError(
            f"`path` must be a file or folder that is there, or a data set that can be loaded, got {source.path!r}"
            f" (split {source.split!r}): {_line(error)}."
        ) from error
    for number, row in enumerate(found, 1):
        yield Place(source.path, number, "row"), row


def named(value: Any) -> str:
    """What a value is, for a message."""
    kinds = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), f"{value!r:.40}")


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
