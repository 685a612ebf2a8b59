"""One thread at a time in a mixture's forward; any other is refused, with the remedies.

Which modules are entered so is the business of `masks.py` and `sequence.py`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_ENTERING = threading.Lock()
# Which thread is in the forward of a backbone; not on the module, whose copy another thread may run.
_RUNNING: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def one_thread(backbone: nn.Module) -> Iterator[None]:
    """Refuses a second thread in a mixture's forward, whose modules hold one call's mask, groups and statistics.

    Args:
        backbone: the module that is called with the attention mask.
    """
    own = threading.get_ident()
    with _ENTERING:
        outer = _RUNNING.get(backbone)
        if outer not in (None, own):
            raise RuntimeError(
                f"a mixture must run in one thread at a time, and another thread is in the forward of this "
                f"{type(backbone).__name__}; share it behind a lock, give each thread a copy (copy.deepcopy), or serve "
                "the merged model, which any number of threads may run."
            )
        _RUNNING[backbone] = own
    try:
        yield
    finally:
        if outer is None:
            with _ENTERING:
                del _RUNNING[backbone]
