"""A teacher's scores, computed once and kept in files, and how a student agrees with them.

Knows tensors and files. Who computes the scores, and on how many processes, is the trainer's business; the scale of the
targets that are made of them is `nn/ensembles.py`'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_atomically

FOLDER = "teacher_scores"


class KeptScores:
    """Scores in files of one folder, each under its key; the first process alone reads and writes them.

    Args:
        folder: made when the first file is written.
        first: whether this process is the first.
        total: sums a tensor over all processes.
    """

    def __init__(self, folder: Path, first: bool, total: Callable[[Tensor], Tensor]) -> None:
        self.folder, self.first, self.total = folder, first, total

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Scores fp64 [N, members] under `key`; `make` gives this process's part of them, zeros elsewhere."""
        path = self.folder / f"{key}.pt"
        found = self._read(path, key) if self.first else None
        shape = torch.zeros(2, dtype=torch.float64) if found is None else torch.tensor(found.shape).double()
        rows, members = (int(n) for n in self.total(shape).tolist())
        if rows:
            mine = torch.zeros(rows, members, dtype=torch.float64) if found is None else found
            return self.total(mine).cpu().double()
        scores = self.total(make()).cpu().double()
        if self.first:
            write_atomically(path, lambda file: torch.save({"key": key, "scores": scores}, file))
        return scores

    def _read(self, path: Path, key: str) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            if found["key"] == key and found["scores"].dtype == torch.float64 and found["scores"].isfinite().all():
                return found["scores"]
            why: object = "it holds something else"
        except Exception as error:  # what torch raises depends on where the file was cut
            why = error
        said = " ".join(str(why).split())[:120] or type(why).__name__
        warnings.warn(f"{path} is damaged ({said}); the teacher's scores are computed again.", stacklevel=2)
        return None


class Agreement:
    """How the student's scores agree with the targets, over what was added since the last `flush`."""

    _MOST = 2048  # texts whose pairs are compared: 2 million pairs, tens of milliseconds

    def __init__(self) -> None:
        self._scores: list[Tensor] = []

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Counts texts: both [n], on the targets' scale."""
        self._scores.append(torch.stack([scores.detach().float(), targets.float()]))

    def flush(self) -> dict[str, float]:
        """Empty if nothing was added.

        `teacher_gap`: root mean square difference, in standard deviations of the teacher. `teacher_correlation`:
        Pearson's. `teacher_agreement`: share of the pairs of texts, of different targets, that the student puts in the
        teacher's order (half a pair where the student gives both the same); of at most 2,048 texts, evenly spaced. The
        latter two are left out where the texts don't say.
        """
        if not self._scores:
            return {}
        scores, targets = torch.cat(self._scores, 1).cpu().double()
        self._scores = []
        metrics = {"teacher_gap": gap(scores, targets)}
        a, b = scores - scores.mean(), targets - targets.mean()
        if (spread := (a.square().sum() * b.square().sum()).sqrt().item()) > 0:
            metrics["teacher_correlation"] = (a * b).sum().item() / spread
        step = max(1, math.ceil(len(scores) / self._MOST))
        s, t = scores[::step], targets[::step]
        order = torch.sign(t[:, None] - t[None]).to(torch.int8)
        agreed = (torch.sign(s[:, None] - s[None]).to(torch.int8) * order).sum().item()
        if pairs := order.abs().sum().item():
            metrics["teacher_agreement"] = (agreed / pairs + 1) / 2
        return metrics


def gap(scores: Tensor, targets: Tensor) -> float:
    """Root mean square difference of two vectors."""
    return (scores - targets).square().mean().sqrt().item()
