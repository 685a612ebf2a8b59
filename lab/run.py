"""Runs a study: units over worker processes of one thread each, resumable after a kill at any moment.

A worker takes one regime and seed at a time, so that arms share what they have in common; each finished unit is a file.
"""

from __future__ import annotations

import functools
import json
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from .arms import Arms
from .config import OPTIMISERS, StudyConfig
from .files import prepare_output, write_atomically
from .online import require_trl
from .store import COLUMNS, UnitStore, write_tables
from .units import Unit, UnitRunner, units_of
from .workers import Report, StudyError, locked, run_groups


@dataclass(frozen=True)
class Group:
    """The units of one regime and seed that are still to be run."""

    regime: str
    seed: int
    units: tuple[Unit, ...]

    def __str__(self) -> str:
        return f"{self.regime} seed {self.seed}"


def run_study(
    study: StudyConfig,
    output: str | Path,
    arms: tuple[str, ...] = (),
    optimisers: tuple[str, ...] = OPTIMISERS,
    progress: bool = True,
) -> list[Path]:
    """Runs what is not yet done and writes the tables.

    Args:
        study: the study.
        output: folder for units, stages and tables; units already there are kept, damaged ones are run again.
        arms: only these; by default all.
        optimisers: only these.
        progress: show a progress bar.

    Returns:
        The CSV files (`store.COLUMNS`). They depend on the study alone, not on interruptions or on the number of
        processes; timings.csv is the exception.

    Raises:
        ValueError: an unknown arm or optimiser, a folder that cannot be used, or one of another study's units.
        StudyError: a worker failed, or another process is at work in the folder.
    """
    for given, known, what in ((arms, tuple(study.arms), "arms"), (optimisers, OPTIMISERS, "optimisers")):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"`{what}` must be among {', '.join(known)}, got {', '.join(unknown)}.")
    tables = (f"{name}.csv" for name in (*COLUMNS, "comparisons"))
    files = (".lock", "study.json", *tables, "tables.md", "report.html")
    output = prepare_output(output, ("units", "stages"), files)
    chosen = tuple(name for name in study.arms if not arms or name in arms)
    with locked(output):
        store = UnitStore(output)
        if any({"rloo", "grpo"} & set(study.optimisers(name)) & set(optimisers) for name in chosen):
            require_trl()  # before anything is trained
        everything = [
            (regime, seed, units_of(study, regime, seed, chosen, optimisers))
            for seed in study.seed_range
            for regime in study.regimes
        ]
        pending = []
        for regime, seed, units in everything:
            left = tuple(u for u in units if store.read(u, _fingerprint(study, u)) is None)
            if left:
                pending.append(Group(regime, seed, left))
        write_atomically(output / "study.json", json.dumps(study_facts(study), indent=1) + "\n")
        total = sum(len(units) for _, _, units in everything)
        left = sum(len(group.units) for group in pending)
        work = functools.partial(run_group, study, output)
        counts = {"name": f"{study.name}: runs", "total": total, "left": left, "progress": progress}
        run_groups(pending, work, study.processes, **counts)
        shutil.rmtree(output / "stages", ignore_errors=True)
        found = []
        for unit in (unit for _, _, group in everything for unit in group):
            found.append(store.read(unit, _fingerprint(study, unit)))
            if found[-1] is None:
                raise StudyError(f"{store.path(unit)} was changed while the study ran; give the same command again.")
        return write_tables(output, found)


def study_facts(study: StudyConfig) -> dict:
    """The study and what it ran on, as JSON-ready data."""
    return {"study": study.to_dict(), "machine": machine_facts()}


def machine_facts() -> dict[str, str]:
    """What a study runs on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def run_group(study: StudyConfig, output: Path, group: Group, report: Report) -> None:
    """Runs the units of one group, writing each as it finishes; its stages are removed at the end."""
    folder = output / "stages" / f"{group.regime}-{group.seed}"
    last = 0.0

    def on_step(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.3 or done == total:
            last = time.monotonic()
            report("step", f"{group}: {stage}", done, total)

    report("step", f"{group}: data", 0, 1)
    runner = UnitRunner(Arms(study, group.regime, group.seed, folder, on_step))
    store = UnitStore(output)
    for unit in group.units:
        report("step", f"{group}: {unit.arm}, {unit.optimiser}", 0, 1)
        store.write(unit, _fingerprint(study, unit), runner.measure(unit))
        report("done")
    shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(study: StudyConfig, unit: Unit) -> str:
    return study.fingerprint(unit.regime, unit.arm, unit.optimiser)
