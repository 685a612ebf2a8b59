"""Runs the stages of the GPU check one by one: their time limits, their processes, and a record after each.

What the stages do is gpu_stages.py's, what a record is gpu_record.py's. Knows neither torch nor a GPU.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import gpu_record
from .gpu_record import ROOT

WORK = ROOT / "build" / "gpu"
LIMIT = 460  # seconds a stage; the rest of 8 minutes is for writing and starting


class StageFailed(Exception):
    """Why a stage cannot go on; what it has found so far is kept."""


@dataclass
class Run:
    """What became of one command."""

    code: int | None  # None: it ran past its limit
    seconds: float
    log: Path

    @property
    def tail(self):
        """The log's last lines, after the first ones that speak of an error, since builders say much after it."""
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines[:-12] if re.search(r"\berror\b|\bmust be\b|asks for", line, re.I)]
        return told[:8] + lines[-12:]


@dataclass
class Context:
    """One stage's means: where it may write, how long it may take, and the result it fills in as it goes.

    Attributes:
        work: folder for logs and what is built.
        wheels: folder of wheels, or None.
        deadline: when its time is up, on `time.monotonic`.
        result: counts, failures and numbers; kept even where the stage ends badly.
    """

    work: Path
    wheels: Path | None
    deadline: float
    result: dict = field(default_factory=lambda: {"counts": {}, "failures": [], "numbers": {}})

    @property
    def remaining(self):
        return max(0.0, self.deadline - time.monotonic())

    @property
    def site(self):
        return self.work / "site"

    def environment(self, **more):
        """The machine's, with what was installed here ahead of everything but the interpreter's own library."""
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(self.site), str(ROOT)]))
        environment["PATH"] = os.pathsep.join([str(self.site / "bin"), environment.get("PATH", "")])
        return environment | more

    def run(self, command, log, limit=None, **environment):
        """Runs a command with its output in a log; past its limit it is killed with every process that it started."""
        path, limit = self.work / f"{log}.log", self.remaining if limit is None else min(limit, self.remaining)
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with open(path, "w") as output:
            output.write("$ " + " ".join(map(str, command)) + "\n")
            output.flush()
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=self.environment(**environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return Run(code, time.monotonic() - began, path)

    def must(self, command, log, **environment):
        """`run`, and the stage fails unless the command succeeds."""
        done = self.run(command, log, **environment)
        if done.code != 0:
            what = "ran past the time limit" if done.code is None else f"ended with {done.code}"
            self.result["failures"].append({"name": log, "message": "\n".join(done.tail)})
            raise StageFailed(f"{log} {what}")
        return done


@dataclass(frozen=True)
class Stage:
    """A function of a Context that fills in its result and raises StageFailed, and the seconds that it may take."""

    run: Callable[[Context], None]
    limit: float = LIMIT


def _commit():
    unknown = {"commit": None, "dirty": None}
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:  # a bare machine may have no git
        return unknown
    if head.returncode:  # no repository here, or not ours: the hash of the sources says what was checked
        return unknown
    status = subprocess.run([*git, "status", "--porcelain", "--", *gpu_record.SOURCES], capture_output=True, text=True)
    return {"commit": head.stdout.strip(), "dirty": bool(status.stdout.strip())}


def run_stage(name, stage, facts, results, work=WORK, wheels=None):
    """Runs one stage and writes its result; returns the result and the record's path.

    The record first says that the stage began, so that one that takes the whole program down leaves a trace as well.
    """
    entry = {"outcome": "began and did not end", "started": gpu_record.now(), **_commit()}
    gpu_record.save_stage(results, facts, name, entry)
    began = time.monotonic()
    context = Context(Path(work), wheels, began + stage.limit)
    try:
        stage.run(context)
        outcome = "failed" if context.result["failures"] else "passed"
    except StageFailed as reason:
        outcome = f"timed out: {reason}" if context.remaining == 0 else f"failed: {reason}"
    except Exception as error:
        outcome = f"failed: {type(error).__name__}: {error}"
    entry |= {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), **context.result}
    return entry, gpu_record.save_stage(results, facts, name, entry)


def check(stages, names, facts, results, work=WORK, wheels=None, copies=None):
    """Runs the named stages in order, whatever becomes of each, and returns whether all passed.

    `copies` is a folder that gets the record and the stages' logs after each stage.
    """
    passed = True
    for name in names:
        entry, path = run_stage(name, stages[name], facts, results, work, wheels)
        passed &= entry["outcome"] == "passed"
        counts = ", ".join(f"{value} {key}" for key, value in entry["counts"].items())
        print(f"{name:9} {entry['outcome']} in {entry['seconds']:.0f} s" + (f" ({counts})" if counts else ""))
        for failure in entry["failures"][:20]:
            print(f"  {failure['name']}: {failure['message']}")
        if copies is not None:
            Path(copies).mkdir(parents=True, exist_ok=True)
            for source in (path, *sorted(Path(work).glob(f"{name}*.log"))):
                shutil.copy(source, copies)
        sys.stdout.flush()
    return passed
