"""How the token mask gets from the attention mask of a call to the upcycled FFN of every layer.

It is an argument of each layer, so that activation checkpointing recomputes with the same one: passed on by a backbone
that passes unknown arguments on, else left beside the call. What an FFN does with its mask is `nn`'s business.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..nn.merging_ffn import MergingFFN
from ..nn.router import in_backward
from ..nn.upcycled_ffn import UpcycledFFN, check_masked
from .families import Family


class UmmLayerMixin:
    """A layer that takes the token mask as an argument, so that checkpointing recomputes with the same one."""

    umm_site: str

    def umm_forward(self, stock_forward: Callable, token_mask: torch.Tensor | None, args: tuple, kwargs: dict):
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

    umm_handed: tuple[torch.Tensor | None] | None = None  # None outside a forward of the backbone

    def __call__(self, *args, **kwargs):
        if self.umm_handed is not None:
            kwargs["token_mask"] = self.umm_handed[0]
        elif in_backward():
            raise RuntimeError(
                f"{type(self).__name__} is recomputed by a checkpointing wrapper that calls the layer anew, without "
                "its token mask; checkpoint with model.gradient_checkpointing_enable() instead of wrapping layers."
            )
        return super().__call__(*args, **kwargs)


def handing_down(stock: type[nn.Module], family: Family) -> Callable:
    """The stock forward of `family.masked`, handing the token mask of a 2-D attention mask down to every layer."""
    stock_forward = stock.forward
    names = list(inspect.signature(stock_forward).parameters)[1:]

    def argument(name: str, args: tuple, kwargs: dict):
        index = names.index(name)
        return args[index] if index < len(args) else kwargs.get(name)

    def token_mask(args: tuple, kwargs: dict) -> torch.Tensor | None:
        mask = argument("attention_mask", args, kwargs)
        tokens = argument("input_ids", args, kwargs)
        tokens = argument("inputs_embeds", args, kwargs) if tokens is None else tokens
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or tokens is None:
            return None
        # with a cache the mask covers past tokens too; the layer sees only the newest ones
        return mask[:, -tokens.shape[1] :].bool()

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        given = kwargs.pop("token_mask", None)
        mask = token_mask(args, kwargs) if given is None else given
        if family.passes_mask:
            if mask is None:
                return stock_forward(self, *args, **kwargs)
            outputs = stock_forward(self, *args, **kwargs, token_mask=mask)
            check_masked(self)
            return outputs
        layers = [module for module in self.modules() if isinstance(module, HandedMaskMixin)]
        for layer in layers:
            layer.umm_handed = (mask,)
        try:
            return stock_forward(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer.umm_handed = None

    return forward
