"""The record of a run: how it is written and read, and the labels that entries are looked up by. Needs no torch."""

import json
import os
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ummrm"
DENSE = "dense FFN, equal FLOPs"
LOOP = "expert loop"
TORCH_GROUPED = "torch grouped_mm"
TRANSFORMERS_EAGER = "transformers eager"
TRANSFORMERS_BATCHED = "transformers batched_mm"
TRANSFORMERS_GROUPED = "transformers grouped_mm"
COMPILED = "transformers grouped_mm, compiled"
MM = "mm, equal size"


class Recorder:
    """Entries in memory and, as they come, as lines of a file: what was measured outlives a run that is killed."""

    def __init__(self, path=None):
        self.entries, self._path = [], path

    def write(self, kind, content):
        """`kind` is "about" (once, first), "rounds" (what was timed, round by round) or "entry"."""
        if kind == "entry":
            self.entries.append(content)
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps({kind: content}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def read_record(path):
    """{"about": ..., "entries": [...]} from a recorder's file; a last line that a kill cut short is left out."""
    record = {"about": None, "entries": []}
    for line in Path(path).read_text().splitlines():
        try:
            ((kind, content),) = json.loads(line).items()
        except json.JSONDecodeError:
            break
        if kind == "about":
            record["about"] = content
        elif kind == "entry":
            record["entries"].append(content)
    return record


def load(path):
    """The record in a file: of a run on a CPU, of a GPU check's benchmarks, or lines as they came.

    Raises:
        ValueError: the file is none of these.
    """
    text = Path(path).read_text()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = read_record(path)
    if "benchmarks" in found and "ummrm" in found:
        found = _of_old(found)
    elif "stages" in found:
        found = found["stages"].get("bench", {}).get("numbers", {})
    if not found.get("about") or "entries" not in found:
        raise ValueError(f"{path} must be a record of the benchmarks, got something else; `make bench` writes one.")
    return found


def _of_old(record):
    """Records of before 2026-11-22 named a case by a group of pytest-benchmark's and a shape."""
    entries = []
    for old in record["benchmarks"]:
        words = [word for word in old["group"].split() if not word.startswith("torch.")]
        directions = [word for word in words if word.startswith("forward")]
        pairs = [word.split("=") for word in old["shape"].split() if "=" in word]
        case = {"suite": words[0], "direction": (directions or ["forward"])[0], "dtype": old["dtype"]}
        sizes = {name.lower(): int(value) for name, value in pairs}
        times = {"best": old["min"], "median": old["median"], "worst": old["max"], "timing": "wall"}
        same = {name: old[name] for name in ("label", "bytes", "flops", "compared", "rounds")}
        entries.append(case | {"sizes": sizes, "outcome": "measured"} | same | times)
    return {"about": record["ummrm"], "entries": entries}
