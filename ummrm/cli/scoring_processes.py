"""Several processes that score parts of one input, each with the model on a device of its own; what a part is, and the
order of what comes out, is the command's business.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    from ..evaluation.scoring import RewardScorer, Scores

P = TypeVar("P")
Tokens = list[list[int]]
_mine: list[RewardScorer] = []  # a process's own


@contextlib.contextmanager
def scoring(scorer: RewardScorer, processes: int, load: dict[str, Any]) -> Iterator[Callable[[Tokens], Any]]:
    """What starts the scoring of a part and returns a function that waits for it, inside the `with` block.

    Args:
        scorer: this process's, which scores itself where there is one process.
        processes: how many.
        load: arguments of `RewardScorer.load` for each of several; `device="cuda"` spreads them over the GPUs.
    """
    if processes == 1:
        yield lambda tokens: lambda: scorer.score_tokens(tokens)
        return
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with ProcessPoolExecutor(processes, context, _start, (number, processes, load)) as pool:
        yield lambda tokens: pool.submit(_score, tokens).result


def in_order(parts: Iterable[P], start: Callable[[P], Callable[[], Scores]], ahead: int) -> Iterator[tuple[P, Scores]]:
    """Parts with their scores, in their order, a few started ahead of the one that is waited for.

    Raises:
        UserError: a process has died.
    """
    started: deque[tuple[P, Callable[[], Scores]]] = deque()
    try:
        for part in parts:
            started.append((part, start(part)))
            if len(started) > ahead:
                first, wait = started.popleft()
                yield first, wait()
        while started:
            first, wait = started.popleft()
            yield first, wait()
    except BrokenProcessPool as error:
        raise UserError(
            "a scoring process has died, as it does where memory runs out; give fewer with --num-processes. With --out "
            "the same command goes on where it was."
        ) from error


def _start(number: Any, processes: int, load: dict[str, Any]) -> None:
    import torch

    from ..evaluation.scoring import RewardScorer
    from .screen import quiet_libraries

    with number.get_lock():
        own, number.value = number.value, number.value + 1
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if load["device"] == "cuda":
        load = {**load, "device": f"cuda:{own % torch.cuda.device_count()}"}
    with quiet_libraries():
        _mine.append(RewardScorer.load(**load))


def _score(tokens: Tokens) -> Scores:
    return _mine[0].score_tokens(tokens)
