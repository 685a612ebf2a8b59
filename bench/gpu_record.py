"""Records of the GPU check: the hash of the sources they speak of, the files they lie in, and whether they are fresh.

One file holds what one GPU said of one state of the sources on one day: bench/results/<gpu>/<date>.json. Stages come
into it one by one, each replacing its own earlier result. Needs neither torch nor a GPU.
"""

import hashlib
import json
import os
import re
import tempfile
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
STAGES = ("build", "test", "sanitize", "bench", "triton")
FORMAT = 1

# Everything that a result on a GPU depends on, apart from what checks it. `autograd.py` is the half of `library.py`
# that decides which operators a backward runs.
SOURCES = (
    "kernels",
    "csrc",
    "third_party",
    "CMakeLists.txt",
    "setup.py",
    "tools/cuda_build.py",
    "tools/architectures.cmake",
    "ummrm/ops/library.py",
    "ummrm/ops/autograd.py",
    "ummrm/ops/backends.py",
    "ummrm/ops/triton_kernels",
)
_MADE = {"__pycache__", ".DS_Store"}


def source_files(root=ROOT):
    """Paths below `root` that the hash covers, in the order of their names."""
    files = []
    for name in SOURCES:
        path = Path(root) / name
        found = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
        files += [p for p in found if p.is_file() and not _MADE & set(p.relative_to(root).parts)]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def source_hash(root=ROOT):
    """sha256 over names and contents of the sources: changed by an edit, a new file, a removed one and a new name."""
    digest = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def slug(device):
    """A folder's name for a device's: lower case, letters and digits, joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def read(path):
    """The record in a file.

    Raises:
        ValueError: the file is no record of this format.
    """
    try:
        record = json.loads(Path(path).read_text())
        known = record["format"] == FORMAT and isinstance(record["stages"], dict) and record["sources"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        known = False
    if not known:
        raise ValueError(f"{path} must be a record of the GPU check in format {FORMAT}; run the check again.")
    return record


def write(path, record):
    """Replaces the file as a whole: a reader, and a program killed at any moment, finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_for(results, device, date, sources):
    """Where a stage's result belongs: the file of that GPU, day and sources, or a new one.

    The day's first state of the sources has the plain date; any other has its hash behind the date.
    """
    folder = Path(results) / slug(device)
    plain, hashed = folder / f"{date}.json", folder / f"{date}-{sources[:12]}.json"
    if plain.exists() and read(plain)["sources"] != sources:
        return hashed
    return plain


def save_stage(results, facts, name, stage):
    """Puts one stage's result into its file, the other stages' left as they are, and returns the path.

    Args:
        results: the folder of all records.
        facts: what holds for every stage: `device`, `sources`, `driver`, `versions`.
        name: one of STAGES.
        stage: its result; `started` (ISO time) decides the day.
    """
    path = file_for(results, facts["device"], stage["started"][:10], facts["sources"])
    stages = read(path)["stages"] if path.exists() else {}
    stages = {n: stage if n == name else stages[n] for n in STAGES if n == name or n in stages}
    write(path, {"format": FORMAT, "date": stage["started"][:10], **facts, "stages": stages})
    return path


def adopt(source, results=RESULTS):
    """Merges a record that was written elsewhere, stage by stage; a stage older than the one here is left out."""
    record = read(source)
    facts = {key: value for key, value in record.items() if key not in ("format", "date", "stages")}
    path = None
    for name, stage in record["stages"].items():
        there = file_for(results, facts["device"], stage["started"][:10], facts["sources"])
        known = read(there)["stages"].get(name) if there.exists() else None
        if known is None or known["started"] < stage["started"]:
            path = save_stage(results, facts, name, stage)
        else:
            path = there
    return path


def now():
    return datetime.now().astimezone().isoformat(timespec="seconds")


def records(results=RESULTS):
    """Every record below `results`, with its path, the newest last."""
    found = [(read(path), path) for path in sorted(Path(results).glob("*/*.json"))]
    return sorted(found, key=lambda pair: max((s["started"] for s in pair[0]["stages"].values()), default=""))


def stage_status(found, name, sources):
    """(fresh and passed, one line) for a stage of one GPU, from its records in `found`, the newest last."""
    runs = [(record, record["stages"][name]) for record, _ in found if name in record["stages"]]
    runs.sort(key=lambda pair: pair[1]["started"])
    fresh = [stage for record, stage in runs if record["sources"] == sources]
    if fresh:
        stage = fresh[-1]
        changes = " (with changes that were not committed)" if stage.get("dirty") else ""
        return stage["outcome"] == "passed", f"{stage['outcome']}, {stage['started'][:10]}, today's sources{changes}"
    if runs:
        record, stage = runs[-1]
        return False, (
            f"stale: {stage['outcome']} on {stage['started'][:10]} with sources {record['sources'][:12]}, "
            f"today's are {sources[:12]}"
        )
    return False, "never checked"
