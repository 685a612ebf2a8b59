"""Random operators on random arguments against the reference: shapes with zeros, layouts, dtypes, masks, any indices.

An example says all that it needs, its seed included, and is printed with a line that repeats it. The fast tier runs a
few of the session's seed, the full tier thousands.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import NAMES, case, plain_of
from tolerances import DTYPES, compare

from ummrm.ops import reference

KINDS = ("random", "first", "hole", "some_dead", "all_dead", "any")
LAYOUTS = ("contiguous", "strided", "transposed", "offset", "broadcast")
# where a value that is not finite can only reach the gradients that the formula gives it to: the reference runs every
# expert on every row, and a NaN among an expert's weights reaches the products with the rows that it leaves out
ELEMENTWISE = ("route", "permute", "unpermute", "activation", "merge_experts", "merge_ffn")


@dataclass(frozen=True)
class Example:
    """One call; `special` is what to plant: (tensor, position, value), numbers modulo what there is."""

    name: str
    shape: tuple[int, int, int, int, int, int]
    dtype: torch.dtype
    kind: str
    layout: str
    options: tuple[int, ...]
    special: tuple[tuple[int, int, float], ...]
    seed: int


def sizes(largest):
    return st.one_of(st.integers(0, 3), st.integers(4, largest))


@st.composite
def examples(draw):
    name = draw(st.sampled_from(NAMES))
    t, h, i, e, s = (draw(sizes(n)) for n in (40, 20, 20, 9, 4))
    if name == "route":
        e = max(e, 1)
    if name.startswith("merge") and s + e == 0:  # nothing to merge
        s = 1
    k = draw(st.integers(1, max(e, 1)))
    special = st.tuples(
        st.integers(0, 20), st.integers(0, 500), st.sampled_from((float("nan"), float("inf"), -float("inf")))
    )
    return Example(
        name,
        (t, h, i, e, k, s),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(LAYOUTS)),
        tuple(draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))),
        tuple(draw(st.lists(special, max_size=2)) if draw(st.booleans()) else ()),
        draw(st.integers(0, 2**31 - 1)),
    )


def laid_out(tensor, layout):
    """The same values in another layout; a leaf."""
    value = tensor.detach()
    if layout == "strided" and value.dim():
        wide = value.new_empty(*value.shape[:-1], 2 * value.shape[-1])[..., ::2]
        value = wide.copy_(value)
    elif layout == "transposed" and value.dim() > 1:
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "offset" and value.dim():
        value = torch.cat([value[:1], value])[1:]
    elif layout == "broadcast" and value.dim() > 1:
        value = value[..., :1].expand(value.shape)
    return value.requires_grad_(tensor.requires_grad)


def options_of(example):
    """The settings that an operator has, from the example's numbers."""
    a, b, c = example.options
    activation = {"activation": tuple(reference.ACTIVATIONS)[a % 5]}
    return {
        "route": {
            "gate": ("shared_complement", "fixed")[a % 2],
            "fixed_shared_weight": b / 9,
            **({"mask": None} if c < 3 else {}),
        },
        "activation": {"kind": activation["activation"], "glu": b % 2 == 0},
        "moe_ffn": activation,
        "merged_ffn": activation,
        "unpermute": ({}, {"shared_weight": None}, {"routed_weights": None})[a % 3],
    }.get(example.name, {})


def arguments_of(example):
    torch.manual_seed(example.seed)
    op, arguments = case(example.name, example.shape, example.dtype, example.kind)
    arguments |= options_of(example)
    leaves, structure = torch.utils._pytree.tree_flatten(arguments)
    floating = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and (i in floating or example.layout != "broadcast"):
            leaves[i] = laid_out(leaf, example.layout)
    for tensor, position, value in example.special:
        leaf = leaves[floating[tensor % len(floating)]] if floating else torch.empty(0)
        if leaf.numel() and not (example.layout == "broadcast" and leaf.dim() > 1):
            at = torch.unravel_index(torch.tensor(position % leaf.numel()), leaf.shape)
            with torch.no_grad():
                leaf[at] = value
    # torch masks relu's gradient, the kernels multiply by a derivative of 0, and 0 * inf is NaN
    forward_alone = example.name not in ELEMENTWISE or "relu" in arguments.get("kind", "")
    if example.special and forward_alone:
        leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return op, torch.utils._pytree.tree_unflatten(leaves, structure)


def check(example):
    op, arguments = arguments_of(example)
    compare(op, plain_of(example.name), arguments, floor_dtype=example.dtype, roundings=4)


@pytest.mark.usefixtures("poisoned")
@given(examples())
def test_against_reference(example):
    check(example)


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@settings(settings.get_profile("full"))
@given(examples())
def test_against_reference_at_length(example):
    check(example)
