"""Classes that are made at run time, from a stock class, and how their instances pickle.

An instance pickles as its stock class and the function that makes ours of it, so that a process that has made no class
yet reads it. Which classes there are is the business of `registry.py` and `masks.py`.
"""

from __future__ import annotations

from collections.abc import Callable

# Where the classes are found by name, through `modeling.__getattr__`.
_MODULE = "ummrm.hf.modeling"


class Generated:
    """Base of every class made here.

    Attributes:
        umm_made_by: the function that makes the class, and its arguments; all of them pickle.
    """

    umm_made_by: tuple

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(2, protocol))
        assert isinstance(reduced, tuple)  # a string would name a global object
        return (_new_instance, type(self).umm_made_by, *reduced[2:])


def _new_instance(make: Callable[..., type], *arguments):
    return object.__new__(make(*arguments))


def new_class(stock: type, mixins: tuple[type, ...], made_by: tuple, namespace: dict) -> type:
    """The class `Umm<stock>`, with `mixins` before the stock class."""
    name = f"Umm{stock.__name__}"
    own = {"__module__": _MODULE, "__qualname__": name, "__doc__": None, "umm_made_by": made_by}
    return type(name, (*mixins, stock), own | namespace)
