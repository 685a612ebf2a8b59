"""The record of a run: how it is written and read, and the labels that entries are looked up by. Needs no torch."""

import json
import os
from pathlib import Path

OURS = "ummrm"
DENSE = "dense FFN, equal FLOPs"
LOOP = "expert loop"
TORCH_GROUPED = "torch grouped_mm"
TRANSFORMERS_EAGER = "transformers eager"
TRANSFORMERS_GROUPED = "transformers grouped_mm"
MM = "mm, equal size"


class Recorder:
    """Entries in memory and, as they come, as lines of a file: what was measured outlives a run that is killed."""

    def __init__(self, path=None):
        self.entries, self._path = [], path

    def write(self, kind, content):
        """`kind` is "about" (once, first) or "entry"."""
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
        else:
            record["entries"].append(content)
    return record
