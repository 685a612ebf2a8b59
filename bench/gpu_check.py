"""The GPU check: builds the package, tests it, runs it under compute-sanitizer and times it, on one machine with a GPU.

    python3 -m bench.gpu_check [--stage build|test|sanitize|bench|triton]... [--limit seconds] [--wheels folder]
                               [--results folder]
    python3 -m bench.gpu_check --adopt FILE...      merges records that another machine wrote

Needs no network, installs nothing outside build/gpu/site: torch, nvcc, cmake and ninja are the machine's, the rest is
unpacked from the wheels it is given. Each stage has its own time limit, writes its result before the next begins, and
can be run alone. This file is the command line; gpu_runner.py runs stages, gpu_stages.py holds them.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from . import gpu_record
from .gpu_record import STAGES
from .gpu_runner import WORK, check
from .gpu_stages import STAGE_TABLE


def device_facts():
    """Name of the GPU and version of its driver, from nvidia-smi; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.strip().splitlines()[:1]
    if done.returncode or not first:
        return None
    name, driver = (part.strip() for part in first[0].split(","))
    return {"device": name, "driver": driver}


_VERSIONS = """
import importlib.metadata, json, platform
found = {"python": platform.python_version()}
for name in ("torch", "triton", "transformers", "pytest", "numpy"):
    try: found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""


def versions():
    """Versions of what the check stands on, as this interpreter and PATH find it before anything is installed."""
    found = json.loads(subprocess.run([sys.executable, "-c", _VERSIONS], capture_output=True, text=True).stdout)
    for tool, pattern in (
        ("nvcc", "release "),
        ("cmake", "version "),
        ("ninja", ""),
        ("compute-sanitizer", "Version "),
    ):
        if path := shutil.which(tool):
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            lines = [line for line in text.splitlines() if pattern in line]
            found[tool] = lines[0].split(pattern)[-1].strip() if pattern and lines else text.strip()[:40]
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=STAGES, help="run this stage alone; may be repeated")
    parser.add_argument("--limit", type=float, help="seconds that each stage may take, where that is less than usual")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the machine lacks, CUTLASS's among them")
    parser.add_argument("--results", type=Path, help="folder that gets a copy of the record and of the logs")
    parser.add_argument("--adopt", nargs="+", type=Path, metavar="FILE", help="merge these records; run nothing")
    options = parser.parse_args(arguments)
    if options.adopt:
        for path in options.adopt:
            print(gpu_record.adopt(path))
        return 0
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {options.wheels}; fill one with `make gpu-wheels`.")
    device = device_facts()
    if device is None:
        print("The GPU check needs an NVIDIA GPU, and nvidia-smi finds none here. Nothing was run or written.")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that a stage's processes go with it
    facts = {**device, "sources": gpu_record.source_hash(), "versions": versions()}
    wheels = options.wheels and options.wheels.resolve()
    names = [name for name in STAGES if not options.stage or name in options.stage]
    stages = {
        name: stage if options.limit is None else replace(stage, limit=min(stage.limit, options.limit))
        for name, stage in STAGE_TABLE.items()
    }
    passed = check(stages, names, facts, gpu_record.RESULTS, WORK, wheels, options.results)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
