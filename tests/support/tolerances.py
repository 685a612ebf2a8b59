"""The one tolerance rule: a kernel may be at most twice as far from the fp64 truth as plain torch in the same dtype.

`compare` runs an operator, the reference in the same dtype, and the reference in fp64 on the same inputs, forward and
backward, and holds every output and gradient to that rule plus a floor for results that plain torch happens to hit.
"""

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Relative to the largest true value: a handful of roundings of the sums in fp64 and fp32 (whose order is free), one
# rounding (half an ulp) in the 16-bit types (whose sums are in fp32).
FLOOR = {torch.float64: 2e-14, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# The largest error of few values is chance, and few values may all have cancelled: below this many, the floor is four
# times as high and relative to at least 1 (inputs are of unit scale). Every operator also has larger cases.
_FEW = 128


def assert_close_to_truth(actual, plain, truth, what="output", floor_dtype=None, roundings=1):
    """Applies the rule to one tensor; NaN and infinities must stand where the truth has them.

    `floor_dtype` is the narrowest dtype on the way to the result, where that is not the result's own, and `roundings`
    how often a value is rounded to it on that way.
    """
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)} instead of {list(truth.shape)}"
    if not truth.is_floating_point():
        assert torch.equal(actual, truth), f"{what}: {actual} instead of {truth}"
        return
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype} instead of {plain.dtype}"
    floor = roundings * FLOOR[floor_dtype or plain.dtype]
    finite = truth.isfinite() & plain.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: finite elsewhere than the truth"
    actual, plain, truth = (t.double()[finite] for t in (actual, plain, truth))
    if truth.numel() == 0:
        return
    scale = truth.abs().max().item()
    if truth.numel() < _FEW:
        scale, floor = max(scale, 1.0), 4 * floor
    allowed = 2 * (plain - truth).abs().max().item() + floor * scale
    error = (actual - truth).abs().max().item()
    assert error <= allowed, (
        f"{what}: error {error:.3g} to the truth, allowed {allowed:.3g} (largest value {scale:.3g})"
    )


def to_double(value):
    """Floating tensors, also in lists, and dtypes in fp64; everything else as it is. The values are the same."""
    if isinstance(value, (list, tuple)):
        return [to_double(v) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def leaves(values):
    """Tensors that require a gradient, in order, out of arguments that may be lists."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(value)
        elif isinstance(value, torch.Tensor) and value.requires_grad:
            yield value


def run(function, arguments, grad_outputs=None):
    """Outputs, gradients of all leaves for `grad_outputs` (random ones if None), and those `grad_outputs`."""
    out = function(**arguments)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    inputs = list(leaves(arguments.values()))
    if not inputs:
        return out, [], []
    if grad_outputs is None:
        grad_outputs = [torch.randn_like(o) if o.is_floating_point() else None for o in out]
    pairs = [(o, g.to(o.dtype)) for o, g in zip(out, grad_outputs, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [o.detach() for o in out], list(grads), grad_outputs


def compare(op, reference, arguments, floor_dtype=None, roundings=1):
    """Holds `op(**arguments)` and its gradients to the rule; `reference` takes the same arguments."""
    actual, actual_grads, grad_outputs = run(op, arguments)
    plain, plain_grads, _ = run(reference, arguments, grad_outputs)
    doubled = {name: to_double(value) for name, value in arguments.items()}
    truth, truth_grads, _ = run(reference, doubled, grad_outputs)
    for i, triple in enumerate(zip(actual, plain, truth, strict=True)):
        assert_close_to_truth(*triple, f"output {i}", floor_dtype, roundings)
    for i, triple in enumerate(zip(actual_grads, plain_grads, truth_grads, strict=True)):
        assert_close_to_truth(*triple, f"gradient {i}", floor_dtype, roundings)
