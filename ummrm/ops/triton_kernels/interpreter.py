"""Honest bfloat16 in Triton's interpreter, which runs kernels on the CPU where TRITON_INTERPRET=1 was set in time.

The interpreter keeps bf16 as its bits in a uint16 and, as it comes (3.6 to 3.9), computes on those integers: casts to
bf16 truncate, `tl.dot` multiplies bit patterns, and arithmetic on bf16 is silently wrong. Here casts round to nearest
even, products widen exactly, and every other arithmetic on bf16 is an error: kernels cast to fp32 first, as on a GPU.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle):
    """bf16 to fp32, exactly: the bits of a bf16 are the upper half of a float's. Everything else as it is."""
    if not is_bf16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(values) -> np.ndarray:
    """fp32 to the bits of the nearest bf16, ties to even; a NaN stays one (its payload could round to infinity)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _refuse(*handles) -> None:
    if any(is_bf16(h) for h in handles):
        raise TypeError("arithmetic on bfloat16 in the interpreter: the kernel must cast to float32 first")


def install() -> None:
    """Mends the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "honest_bf16", False):
        return
    builder.honest_bf16 = True
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op

    def honest_cast(self, source, to):
        if is_bf16(source) and to.scalar != tl.bfloat16:
            return cast(self, widened(source), to)
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return _Handle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def honest_fp_to_fp(self, source, to, rounding):
        if is_bf16(source) or to.scalar == tl.bfloat16:
            return honest_cast(self, source, to)
        return fp_to_fp(self, source, to, rounding)

    def honest_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def honest_binary(self, left, right, op):
        _refuse(left, right)
        return binary(self, left, right, op)

    def honest_unary(self, operand, op):
        _refuse(operand)
        return unary(self, operand, op)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = honest_cast, honest_fp_to_fp, honest_dot
    builder.binary_op, builder.unary_op = honest_binary, honest_unary
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply = _guarded(operation.apply)


def _guarded(apply):
    def honest_apply(self, inputs):
        _refuse(*(t.handle for t in (inputs if isinstance(inputs, tuple) else (inputs,))))
        return apply(self, inputs)

    return honest_apply


def quiet():
    """numpy warns where a kernel overflows or divides by zero on purpose; a GPU does not."""
    return np.errstate(all="ignore")
