"""One way to do what a case asks for: what suites hand to the harness."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One way to do it.

    Attributes:
        function: takes the arguments that `make()` returns, by name, and returns a tensor or several.
        make: builds one set of random arguments, and again for every further set; None: the case's own inputs.
        reference: function whose outputs and gradients this one's must match; None: the case's, unless `make` is
            given: other inputs are of something else by design.
        bytes: its least traffic, where that is not the case's.
        graph: time it inside a replayed CUDA graph (on CUDA only).
        foreign: code of others that nobody here may have run: where it breaks, that is its outcome, no failure.
    """

    function: Callable
    make: Callable | None = None
    reference: Callable | None = None
    bytes: int | None = None
    graph: bool = False
    foreign: bool = False
