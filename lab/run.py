"""Runs a study: units over worker processes of one thread each, resumable after a kill at any moment.

A worker takes one regime and seed at a time, so that arms share what they have in common; each finished unit is a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import queue
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .arms import Arms
from .config import OPTIMISERS, StudyConfig
from .demo.run import quiet_transformers
from .files import prepare_output, write_atomically
from .online import require_trl
from .store import COLUMNS, UnitStore, write_tables
from .units import Unit, UnitRunner, units_of

Report = Callable[..., None]
"""Called with the kind of event and its details."""


class StudyError(RuntimeError):
    """A worker failed; finished units are kept, and the same command goes on from them."""


@dataclass(frozen=True)
class Group:
    """The units of one regime and seed that are still to be run."""

    regime: str
    seed: int
    units: tuple[Unit, ...]


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
        _run_groups(study, output, pending, total, progress)
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
    where = f"{group.regime} seed {group.seed}"
    folder = output / "stages" / f"{group.regime}-{group.seed}"
    last = 0.0

    def on_step(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.3 or done == total:
            last = time.monotonic()
            report("step", f"{where}: {stage}", done, total)

    report("step", f"{where}: data", 0, 1)
    runner = UnitRunner(Arms(study, group.regime, group.seed, folder, on_step))
    store = UnitStore(output)
    for unit in group.units:
        report("step", f"{where}: {unit.arm}, {unit.optimiser}", 0, 1)
        store.write(unit, _fingerprint(study, unit), runner.measure(unit))
        report("done")
    shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(study: StudyConfig, unit: Unit) -> str:
    return study.fingerprint(unit.regime, unit.arm, unit.optimiser)


def _run_groups(study: StudyConfig, output: Path, groups: list[Group], total: int, progress: bool) -> None:
    if not groups:
        return
    workers = min(study.processes, len(groups))
    left = sum(len(group.units) for group in groups)
    bars = Progress(
        TextColumn("{task.description:<38}"),  # so that 80 columns hold a row
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not progress,
        refresh_per_second=2,  # the drawing shares its core with a worker
    )
    with bars, quiet_transformers():
        rows = [bars.add_task("starting", total=1, note="") for _ in range(workers)]
        overall = bars.add_task(f"{study.name}: runs", total=total, completed=total - left, note="")
        start, done = time.monotonic(), 0

        def show(worker: int, kind: str, *details) -> None:
            nonlocal done
            if kind == "step":
                text, step, steps = details
                bars.update(rows[worker], description=text, completed=step, total=steps)
            elif kind == "done":
                done += 1
                seconds = (time.monotonic() - start) / done * (left - done)
                bars.update(overall, advance=1, note=f"about {minutes(seconds)} left")

        if workers == 1:
            _here(study, output, groups, show)
        else:
            _in_processes(study, output, groups, workers, show)


def _here(study: StudyConfig, output: Path, groups: list[Group], show: Report) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for group in groups:
            run_group(study, output, group, lambda *event: show(0, *event))
    finally:
        torch.set_num_threads(threads)


def _in_processes(study: StudyConfig, output: Path, groups: list[Group], workers: int, show: Report) -> None:
    context = multiprocessing.get_context("spawn")
    tasks, events = context.Queue(), context.Queue()
    for group in [*groups, *[None] * workers]:
        tasks.put(group)
    processes = [
        context.Process(target=_work, args=(i, study, output, tasks, events), daemon=True) for i in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        finished = 0
        while finished < workers:
            try:
                worker, kind, *details = events.get(timeout=2)
            except queue.Empty:
                dead = [p for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise StudyError(
                        f"a worker process ended with exit code {dead[0].exitcode}, perhaps for want of memory; "
                        "finished runs are kept: give the same command again, with fewer processes if need be."
                    ) from None
                continue
            if kind == "failed":
                raise StudyError(f"{details[0]}\nFinished runs are kept; the same command goes on from them.")
            if kind == "finished":
                finished += 1
            else:
                show(worker, kind, *details)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(worker: int, study: StudyConfig, output: Path, tasks, events) -> None:
    """A worker process: groups until there are none. Ends at once when its parent does, however that came about."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    try:
        with quiet_transformers():
            while (group := tasks.get()) is not None:
                run_group(study, output, group, lambda *event: events.put((worker, *event)))
    except Exception:
        events.put((worker, "failed", f"{group.regime} seed {group.seed}:\n{traceback.format_exc()}"))
        return
    events.put((worker, "finished"))


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps an output folder for one process.

    Raises:
        StudyError: another one is at work in it.
    """
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"another process is at work in {output}; wait for it, or take another folder.") from None
        yield


def minutes(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
