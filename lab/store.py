"""The files of a study: one for each finished unit, written atomically and with a digest, and the CSV files of them.

runs.csv, curves.csv and experts.csv hold what a rerun gives bit for bit; timings.csv holds what it does not.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .files import digest, warn_damaged, write_atomically
from .units import VALUES

KEY = ("regime", "seed", "arm", "optimiser")
COLUMNS = {
    "runs": (*KEY, *VALUES),
    "curves": (
        *KEY,
        "step",
        "kl",
        "proxy",
        "gold",
        "shortcut",
        "kl_estimate",
        "entropy",
        "length",
        "clip_fraction",
        "value_loss",
    ),
    "experts": (*KEY, "step", "layer", "measure", "expert", "regime_of_pairs", "value"),
    "timings": (*KEY, "seconds", "forward_ms", "dense_forward_ms"),
}


class UnitStore:
    """Finished units in a folder: dataclasses of plain fields, each named by its `str`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "units"

    def path(self, unit: Any) -> Path:
        """A unit's file."""
        return self.folder / f"{unit}.json"

    def write(self, unit: Any, fingerprint: str, found: dict) -> None:
        """Keeps a finished unit, atomically."""
        made = {**asdict(unit), "fingerprint": fingerprint, **found}
        write_atomically(self.path(unit), json.dumps({**made, "digest": digest(made)}))

    def read(self, unit: Any, fingerprint: str) -> dict | None:
        """A finished unit, or None; a file that is cut off, altered or another unit's is named, and is none.

        Raises:
            ValueError: the file is of another configuration.
        """
        path = self.path(unit)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            sound = found.pop("digest") == digest(found) and all(found[k] == v for k, v in asdict(unit).items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            warn_damaged(path, error)
            return None
        if not sound:
            warn_damaged(path, "its content is not what was written there")
            return None
        if found["fingerprint"] != fingerprint:
            raise ValueError(
                f"{path} was made with another configuration of this arm (fingerprint {found['fingerprint']}, now "
                f"{fingerprint}); choose another output folder, or remove that one to start again."
            )
        return found


def write_tables(folder: Path, found: Iterable[dict], columns: Mapping[str, tuple[str, ...]] = COLUMNS) -> list[Path]:
    """The CSV files of all units, in the order given; numbers as Python writes them, so that they read back exactly."""
    rows: dict[str, list[dict]] = {name: [] for name in columns}
    for unit in found:
        key = {name: unit[name] for name in KEY}
        rows["runs"].append({**key, **unit["values"]})
        rows["curves"] += [{**key, **row} for row in unit["curve"]]
        for row in unit["experts"]:
            rows["experts"].append({**row, **key, "regime_of_pairs": row["regime"]})
        rows["timings"].append({**key, **unit["timings"]})
    paths = []
    for name, table in rows.items():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns[name], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        paths.append(folder / f"{name}.csv")
        write_atomically(paths[-1], text.getvalue())
    return paths


def read_table(folder: Path, name: str) -> list[dict]:
    """A CSV file's rows: numbers as floats, seeds as integers, empty cells as NaN where the column holds numbers.

    Of a kept study it may be compressed, `name.csv.gz`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / f"{name}.csv"
    packed = path.with_suffix(".csv.gz")
    if not path.is_file() and not packed.is_file():
        raise FileNotFoundError(f"no {path}; `python -m lab run` writes it.")
    text = {"regime", "arm", "optimiser", "layer", "measure", "regime_of_pairs"}
    with open(path, newline="") if path.is_file() else gzip.open(packed, "rt", newline="") as file:
        return [
            {k: v if k in text else int(v) if k == "seed" else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
