"""Triton kernels of the expert's nonlinearity: act(gate) * up on rows (gate | up), or act(z), and the backward, which
also yields the gate-weighted activation and <grad, A> of each row. Computed in fp32 (fp64), rounded once; memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, blocks, launch, tile, wide

_TILE = 2048  # elements of a program's tile


@triton.jit
def value_and_slope(z, KIND: tl.constexpr):
    """act(z) and its derivative, in z's dtype; what goes unused the compiler drops. relu keeps NaN, as in torch."""
    if KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return z * s, s * (1.0 + z * (1.0 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_tanh":  # 0.5 z (1 + tanh u) = z sigmoid(2u)
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif KIND == "relu":
        return tl.where(z < 0.0, 0.0, z), tl.where(z > 0.0, z * 0.0 + 1.0, 0.0)
    else:
        positive = tl.where(z < 0.0, 0.0, z)
        return positive * positive, 2.0 * positive


@triton.jit
def _activation(
    pre_activation,
    out,
    num_rows,
    width,
    KIND: tl.constexpr,
    GLU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (column < width)
    pre_width = width * (2 if GLU else 1)
    z = tl.load(pre_activation + row * pre_width + column, mask=inside, other=0.0).to(ACC)
    act, _slope = value_and_slope(z, KIND)
    if GLU:
        act *= tl.load(pre_activation + row * pre_width + width + column, mask=inside, other=0.0).to(ACC)
    tl.store(out + row * width + column, act.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward(
    grad,
    pre_activation,
    row_weights,
    grad_pre_activation,
    weighted_activation,
    row_dots,
    num_rows,
    width,
    KIND: tl.constexpr,
    GLU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program goes through its rows from end to end, since their dots are sums over them."""
    OUT: tl.constexpr = grad_pre_activation.dtype.element_ty
    each = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists, row = each < num_rows, each[:, None]
    pre_width = width * (2 if GLU else 1)
    weight = tl.full([ROWS], 1.0, ACC)
    if row_weights is not None:
        weight = tl.load(row_weights + each, mask=exists, other=0.0)
    dots = tl.full([ROWS, COLUMNS], 0.0, ACC)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = exists[:, None] & (column < width)
        z = tl.load(pre_activation + row * pre_width + column, mask=inside, other=0.0).to(ACC)
        g = tl.load(grad + row * width + column, mask=inside, other=0.0).to(ACC)
        act, slope = value_and_slope(z, KIND)
        weighted = g * weight[:, None]
        if GLU:
            up = tl.load(pre_activation + row * pre_width + width + column, mask=inside, other=0.0).to(ACC)
            tl.store(grad_pre_activation + row * pre_width + width + column, (weighted * act).to(OUT), mask=inside)
            act *= up
            slope *= up
        tl.store(grad_pre_activation + row * pre_width + column, (weighted * slope).to(OUT), mask=inside)
        if row_weights is not None:
            tl.store(weighted_activation + row * width + column, (act * weight[:, None]).to(OUT), mask=inside)
            dots += tl.where(inside, g * act, 0.0)
    if row_weights is not None:
        tl.store(row_dots + each, tl.sum(dots, 1), mask=exists)


def activation(pre_activation: Tensor, kind: str, glu: bool) -> Tensor:
    rows, width = pre_activation.shape
    width //= 2 if glu else 1
    out = pre_activation.new_empty(rows, width)
    each, columns = tile(width, _TILE, out.dtype)
    launch(
        _activation,
        (blocks(rows, each), blocks(width, columns)),
        out,
        pre_activation.contiguous(),
        out,
        rows,
        width,
        KIND=kind,
        GLU=glu,
        ACC=wide(out),
        ROWS=each,
        COLUMNS=columns,
    )
    return out


def activation_backward(
    grad: Tensor, pre_activation: Tensor, row_weights: Tensor | None, kind: str, glu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    like, (rows, width) = pre_activation, grad.shape
    weighted, dots = like.new_empty(0), like.new_empty(0, dtype=accumulator(like))
    if row_weights is not None:
        row_weights = row_weights.contiguous()
        weighted, dots = like.new_empty(rows, width), dots.new_empty(rows)
    grad_pre = torch.empty_like(pre_activation, memory_format=torch.contiguous_format)
    each, columns = tile(width, _TILE // 2, like.dtype)
    launch(
        _activation_backward,
        (blocks(rows, each),),
        grad,
        grad.contiguous(),
        pre_activation.contiguous(),
        row_weights,
        grad_pre,
        weighted,
        dots,
        rows,
        width,
        KIND=kind,
        GLU=glu,
        ACC=wide(like),
        ROWS=each,
        COLUMNS=columns,
    )
    return grad_pre, weighted, dots
