"""Where a run stands: a bar with the time left on a terminal, a line a stage anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

_NARROW = 64  # columns of a terminal that has no room for a bar and the time gone by


class Bar(TrainerCallback):
    """A stage's steps on a terminal.

    Args:
        stage: its name.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_local_process_zero and sys.stderr.isatty():
            console = Console(stderr=True)
            self._bar = Progress(*_columns(console.width), console=console, transient=True)
            self._task = self._bar.add_task(self.stage, total=state.max_steps, completed=state.global_step, loss="")
            self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None and logs and "loss" in logs:
            self._bar.update(self._task, loss=f"loss {logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _columns(width: int) -> list[ProgressColumn]:
    """What a line of progress shows on a terminal of so many columns."""
    stage, done, left = TextColumn("  {task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    loss = TextColumn("{task.fields[loss]}")
    if width < _NARROW:
        return [stage, done, left, loss]
    return [stage, BarColumn(bar_width=24), done, TimeElapsedColumn(), left, loss]
