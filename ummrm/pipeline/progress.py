"""Where a run stands: a bar with the time left on a terminal, a line a stage anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


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
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=Console(stderr=True),
                transient=True,
            )
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
