"""How the token mask gets from the attention mask of a call to the upcycled FFN of every layer.

It is an argument of each layer, so that activation checkpointing recomputes with the same one: passed on by a backbone
that passes unknown arguments on, else left beside the call. What an FFN does with its mask is `nn`'s business.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn.assignment import RowGroups, going_by, sequence_modules
from ..nn.merging_ffn import MergingFFN
from ..nn.router import in_backward
from ..nn.upcycled_ffn import UpcycledFFN, check_masked
from ..ops.library import checking
from .generated import Generated, new_class
from .one_thread import one_thread
from .sequence import by_sequence, check_no_groups, handed_groups, run_by_sequence, spread

# An additive mask hides a key with at most this: exp(-1e4) is 0 in every dtype. The minimum of any dtype lies below it
# (a mask may hold another dtype's), and position biases, which hide nothing, above.
_HIDDEN = -1e4


def token_mask_of(mask: object, tokens: Tensor, cache: Any = None) -> Tensor | None:
    """Which of a call's tokens are live, read off its attention mask.

    Padding is a key position that no query may attend to. A packed batch, block-diagonal with every token attending to
    itself, has none.

    Args:
        mask: what transformers' backbones take as `attention_mask`: None; [batch, keys], true or not zero for live;
            [batch or 1, heads or 1, queries, keys], or without heads, bool, true where a query may attend to a key; the
            same in float, to be added to the scores; or a dict of such, one for each kind of attention layer.
        tokens: [batch, sequence, ...] of the call: input_ids or inputs_embeds.
        cache: transformers' cache, whose tokens come before the call's among the keys.

    Returns:
        bool [batch, sequence], or None where all are live.

    Raises:
        ValueError: the mask is of another kind, or of a shape that does not say which keys are the call's tokens.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        live = None
        for one in mask.values():  # a key that only some of the layers see is live
            reduced = token_mask_of(one, tokens, cache)
            if reduced is None:
                return None
            live = reduced if live is None else live | reduced
        return live
    batch, length = tokens.shape[:2]
    if not isinstance(mask, Tensor):
        raise _not_understood(mask)
    if mask.dim() == 2:
        # with a cache the mask covers past tokens too; the layer sees only the newest ones
        return mask[:, -length:].bool()
    if mask.dim() not in (3, 4) or not (mask.dtype == torch.bool or (mask.is_floating_point() and mask.dim() == 4)):
        raise _not_understood(mask)
    allowed = mask
    if mask.is_floating_point():
        # values are read on the host where that costs no synchronisation, or on request
        readable = not torch.compiler.is_compiling() and (mask.device.type == "cpu" or checking())
        if readable and mask.numel() and mask.max() > 0:
            raise _not_understood(mask, "with values above 0")
        allowed = mask > _HIDDEN
    keys = mask.shape[-1]
    if keys < length or mask.shape[0] not in (1, batch) or (keys > length and cache is None):
        raise _not_understood(mask, f"for {batch} sequences of {length} tokens")
    seen = allowed.flatten(1, -2).any(1)  # [batch or 1, keys]
    if keys > length:
        # A cache of fixed size holds keys to come behind the newest ones, one that slides has dropped the oldest.
        past = cache.get_seq_length()
        start = past.clamp(max=keys - length) if isinstance(past, Tensor) else min(past, keys - length)
        seen = seen[:, torch.arange(length, device=mask.device) + start]
    return seen.expand(batch, length)


def _not_understood(mask: object, what: str = "") -> ValueError:
    got = type(mask).__name__
    if isinstance(mask, Tensor):
        got = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)} {what}".rstrip()
    return ValueError(
        "`attention_mask` must say which tokens are padding, which are routed to no expert: [batch, sequence], or bool "
        "[batch, heads, queries, keys] (True where a query may attend), or float of that shape (0 where it may, the "
        f"dtype's minimum where not), got {got}; pass one of these, or token_mask=[batch, sequence] beside it (True "
        "for live tokens)."
    )


if TYPE_CHECKING:  # what the mixins are mixed into
    _Stock = nn.Module
else:
    _Stock = object


class UmmLayerMixin(Generated, _Stock):
    """A layer that takes the token mask as an argument, so that checkpointing recomputes with the same one.

    By sequence it takes the rows of each expert instead.

    Attributes:
        umm_site: where its FFN stands, below the layer.
        umm_above: by sequence: whether it is the first layer that holds experts, or above it.
    """

    umm_site: str
    umm_above = True

    def umm_by_sequence(self, stock_forward: Callable, rows: RowGroups, args: tuple, kwargs: dict):
        if rows.copies > 1 and self.umm_above:
            args, kwargs = (), spread(rows, stock_forward, args, kwargs)
        with going_by(sequence_modules(self).values(), rows):
            return stock_forward(self, *args, **kwargs)

    def umm_forward(self, stock_forward: Callable, token_mask: Tensor | None, args: tuple, kwargs: dict):
        ffn = self.get_submodule(self.umm_site)
        if not isinstance(ffn, (UpcycledFFN, MergingFFN)):  # a layer that was not chosen for upcycling
            return stock_forward(self, *args, **kwargs)
        ffn.token_mask = token_mask
        try:
            return stock_forward(self, *args, **kwargs)
        finally:
            ffn.token_mask = None


class HandedMaskMixin(UmmLayerMixin):
    """A layer whose backbone passes no argument on: `handing_down` leaves the token mask here beside the call.

    The call makes it an argument, which transformers' own activation checkpointing keeps for the recomputation.
    """

    umm_handed: dict[str, Any] | None = None  # None outside a forward of the backbone

    def __call__(self, *args, **kwargs):
        if self.umm_handed is not None:
            kwargs |= self.umm_handed
        elif in_backward():
            raise RuntimeError(
                f"{type(self).__name__} is recomputed by a checkpointing wrapper that calls the layer anew, without "
                "its token mask; checkpoint with model.gradient_checkpointing_enable() instead of wrapping layers."
            )
        return super().__call__(*args, **kwargs)


_MAKING = threading.RLock()


def _once(make: Callable[..., type[nn.Module]]) -> Callable[..., type[nn.Module]]:
    """`functools.cache` that gives threads which ask at once the same class."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def locked(*arguments):
        with _MAKING:
            return cached(*arguments)

    return locked


@_once
def umm_layer_class(stock: type[nn.Module], passes_mask: bool) -> type[nn.Module]:
    """The class of a stock layer whose backbone passes the token mask on, or does not."""
    stock_forward = stock.forward

    def forward(self, *args, token_mask=None, groups=None, **kwargs):
        if groups is not None:
            return self.umm_by_sequence(stock_forward, groups, args, kwargs)
        return self.umm_forward(stock_forward, token_mask, args, kwargs)

    functools.update_wrapper(forward, stock_forward)  # transformers reads layer signatures
    mixin = UmmLayerMixin if passes_mask else HandedMaskMixin
    return new_class(stock, (mixin,), (umm_layer_class, stock, passes_mask), {"forward": forward})


@_once
def umm_inner_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class of a stock module below the backbone that is the one called with the attention mask."""
    return new_class(stock, (Generated,), (umm_inner_class, stock), {"forward": handing_down(stock)})


def handing_down(stock: type[nn.Module]) -> Callable:
    """The stock forward of a module that may be called with the attention mask, handing the token mask to every layer.

    The module's `umm_passes_mask` says whether it passes arguments on that it does not know; None: it is not the one.
    """
    stock_forward = stock.forward
    names = list(inspect.signature(stock_forward).parameters)[1:]

    def argument(name: str, args: tuple, kwargs: dict):
        index = names.index(name) if name in names else len(args)
        return args[index] if index < len(args) else kwargs.get(name)

    def token_mask(args: tuple, kwargs: dict) -> Tensor | None:
        tokens = argument("input_ids", args, kwargs)
        tokens = argument("inputs_embeds", args, kwargs) if tokens is None else tokens
        if tokens is None:
            return None
        cache = argument("cache", args, kwargs)
        cache = argument("past_key_values", args, kwargs) if cache is None else cache  # until transformers 5.23
        return token_mask_of(argument("attention_mask", args, kwargs), tokens, cache)

    def with_layers(self, args: tuple, kwargs: dict, handed: dict[str, Any]):
        """The stock forward, with `handed` for every layer."""
        if self.umm_passes_mask:
            return stock_forward(self, *args, **kwargs, **handed)
        layers = [module for module in self.modules() if isinstance(module, HandedMaskMixin)]
        for layer in layers:
            layer.umm_handed = handed
        try:
            return stock_forward(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer.umm_handed = None

    def run(self, args: tuple, kwargs: dict):
        if by_sequence(self.config):
            call = lambda bound, rows: with_layers(self, (), bound, {"groups": rows})  # noqa: E731
            return run_by_sequence(self, stock_forward, args, kwargs, call)
        check_no_groups(kwargs.pop("groups", None))
        mask = kwargs.pop("token_mask", None)
        if mask is None and self.config.umm_phase == "mixture":  # a merged FFN computes padding as any token
            mask = token_mask(args, kwargs)
        if self.umm_passes_mask and mask is None:
            return stock_forward(self, *args, **kwargs)
        outputs = with_layers(self, args, kwargs, {"token_mask": mask})
        if self.umm_passes_mask:
            check_masked(self)
        return outputs

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        if self.umm_passes_mask is None:
            if not by_sequence(self.config):
                check_no_groups(kwargs.pop("groups", None))
            with handed_groups(self, kwargs.pop("groups")) if "groups" in kwargs else contextlib.nullcontext():
                return stock_forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or self.config.umm_phase != "mixture":
            return run(self, args, kwargs)
        with one_thread(self):
            return run(self, args, kwargs)

    return forward
