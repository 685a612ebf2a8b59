"""Groups of a study's units, in this process or over worker processes of one thread each, under one progress display.

Knows nothing of what a group is: a study says how one is run (`RunGroup`), and keeps what was finished itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from ummrm.memory import keep_freed_memory

Report = Callable[..., None]
"""Called with the kind of event and its details: `step`, text, done, total; or `done`, for a finished unit."""

RunGroup = Callable[[Any, Report], None]
"""Runs one group, whose `str` names it. It must pickle where there are several processes."""


class StudyError(RuntimeError):
    """A worker failed; finished units are kept, and the same command goes on from them."""


def run_groups(
    groups: Sequence[Any],
    run_group: RunGroup,
    processes: int,
    *,
    name: str,
    total: int,
    left: int,
    progress: bool,
    width: int = 38,
) -> None:
    """Runs every group, in order; each worker takes the next one when it is free.

    Args:
        groups: what is to be run.
        run_group: runs one.
        processes: at most so many; 1 is this one.
        name: what the progress display counts.
        total: units of the study.
        left: units of `groups`.
        progress: show it.
        width: of its texts; 38 leaves a row 80 columns.

    Raises:
        StudyError: a worker failed.
    """
    if not groups:
        return
    workers = min(processes, len(groups))
    bars = Progress(
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not progress,
        refresh_per_second=2,  # the drawing shares its core with a worker
    )
    with bars, quiet_transformers():
        rows = [bars.add_task("starting", total=1, note="") for _ in range(workers)]
        overall = bars.add_task(name, total=total, completed=total - left, note="")
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
            _here(groups, run_group, show)
        else:
            _in_processes(groups, run_group, workers, show)


def _here(groups: Sequence[Any], run_group: RunGroup, show: Report) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for group in groups:
            run_group(group, lambda *event: show(0, *event))
    finally:
        torch.set_num_threads(threads)


def _in_processes(groups: Sequence[Any], run_group: RunGroup, workers: int, show: Report) -> None:
    context = multiprocessing.get_context("spawn")
    tasks, events = context.Queue(), context.Queue()
    for group in [*groups, *[None] * workers]:
        tasks.put(group)
    processes = [context.Process(target=_work, args=(i, run_group, tasks, events), daemon=True) for i in range(workers)]
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


def _work(worker: int, run_group: RunGroup, tasks, events) -> None:
    """A worker process: groups until there are none. Ends at once when its parent does, however that came about."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        with quiet_transformers():
            while (group := tasks.get()) is not None:
                run_group(group, lambda *event: events.put((worker, *event)))
    except Exception:
        events.put((worker, "failed", f"{group}:\n{traceback.format_exc()}"))
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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars, which would break ours up."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def minutes(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
