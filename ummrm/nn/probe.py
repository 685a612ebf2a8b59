"""Recognising an FFN that nobody described: by its structure, and proven by its output.

The candidates (which projection is the gate, which activation) are evaluated on random input and compared with the
module's own output, so that a wrong guess cannot pass. Where the FFN of a whole layer is, is `detect.py`'s business.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import nn

from ..ops.reference import ACTIVATIONS
from .dense import FFNPaths, Projection, apply_ffn, is_linear

_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 1e-5  # relative; the closest pair, gelu and gelu_tanh, differ by about 1e-4 at unit pre-activations


def find_paths(module: nn.Module) -> FFNPaths:
    """Recognises an unknown FFN module by its structure, and proves it by its output.

    Args:
        module: maps [..., H] to [..., H] through two (plain, or gate and up fused) or three (gated) linear modules,
            each a linear map by `dense.is_linear`.

    Returns:
        The paths of its projections and its activation.

    Raises:
        ValueError: the module has no such structure, or no candidate reproduces its output; says what was found and
            how to name the layout (`FFNPaths`).
    """
    what = type(module).__name__
    remedy = (
        "Name the layout: FFNPaths(gate=..., up=..., down=..., activation=...), or FFNPaths(up=..., down=..., ...)."
    )
    linears = {name: Projection(m) for name, m in module.named_modules() if is_linear(m)}
    shapes = ", ".join(f"{n}: {m.in_features} to {m.out_features}" for n, m in linears.items()) or "none"
    if len(linears) not in (2, 3):
        raise ValueError(
            f"`ffn` must have two (plain) or three (gated) nn.Linear projections to be recognised, got "
            f"{what} with {len(linears)} ({shapes}). {remedy}"
        )
    dropouts = [n for n, m in module.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    if dropouts:
        raise ValueError(
            f"`ffn` must hold no active dropout, got {what} with dropout at {', '.join(dropouts)}; an expert has none "
            "inside. Set its p to 0 and, if you want dropout, apply it to the FFN's output."
        )
    candidates = _candidates(linears)
    if not candidates:
        raise ValueError(
            f"`ffn` must map its hidden size onto itself through an intermediate size, got {what} with {shapes}. "
            f"{remedy}"
        )
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(f"`ffn` must hold real weights to be recognised, got {what} on the meta device. {remedy}")
    errors = sorted((error, i) for i, error in enumerate(_probe(module, candidates)))
    best_error, best = errors[0]
    if best_error > _PROBE_TOLERANCE:
        raise ValueError(
            f"`ffn` must compute down(act(gate(x)) * up(x)) or down(act(up(x))) with act in {', '.join(ACTIVATIONS)}; "
            f"{what} ({shapes}) computes something else: the closest candidate, {candidates[best]}, is off by "
            f"{best_error:.1e} (relative). It cannot be upcycled as it is."
        )
    if len(errors) > 1 and errors[1][0] <= _PROBE_TOLERANCE:
        raise ValueError(
            f"`ffn`: two readings of {what} fit its output, {candidates[best]} and {candidates[errors[1][1]]} "
            f"(all-zero weights?). {remedy}"
        )
    _check_alike_in_training(module, candidates[best])
    return candidates[best]


def prove_paths(module: nn.Module, paths: FFNPaths) -> FFNPaths:
    """`paths` with its activation, if the FFN that it names computes what `module` computes.

    Raises:
        ValueError: a path is wrong, or the module computes something else (another activation, a norm or an active
            dropout inside, ...).
    """
    activations = [paths.activation] if paths.activation is not None else list(ACTIVATIONS)
    candidates = [replace(paths, activation=activation) for activation in activations]
    for candidate in candidates:
        candidate.read(module)
    errors = _probe(module, candidates)
    best = min(range(len(errors)), key=errors.__getitem__)
    if not errors[best] <= _PROBE_TOLERANCE:
        raise ValueError(
            f"`paths` must name an FFN that computes what `ffn` computes; {candidates[best]} is off by "
            f"{errors[best]:.1e} (relative) from {type(module).__name__}: another activation, or more in the module "
            "than its projections (a norm, a residual, a dropout). Upcycle the part that is the FFN alone."
        )
    _check_alike_in_training(module, candidates[best])
    return candidates[best]


def _candidates(linears: dict[str, Projection]) -> list[FFNPaths]:
    """Every reading of the modules that their shapes allow, once for each activation."""
    layouts: list[tuple[str | None, str, str]] = []
    for down_name, down in linears.items():
        others = {name: other for name, other in linears.items() if name != down_name}
        if {other.in_features for other in others.values()} != {down.out_features}:
            continue
        names, outputs = list(others), {other.out_features for other in others.values()}
        if outputs == {down.in_features} and len(names) == 1:
            layouts.append((None, names[0], down_name))
        elif outputs == {down.in_features}:
            layouts += [(names[0], names[1], down_name), (names[1], names[0], down_name)]
        elif outputs == {2 * down.in_features} and len(names) == 1:
            halves = f"{names[0]}[0]", f"{names[0]}[1]"
            layouts += [(*halves, down_name), (*halves[::-1], down_name)]
    return [
        FFNPaths(gate=gate, up=up, down=down, activation=activation)
        for gate, up, down in layouts
        for activation in ACTIVATIONS
    ]


@torch.no_grad()
def _probe(module: nn.Module, candidates: list[FFNPaths]) -> list[float]:
    """Relative error of each candidate against the module's own output, in fp32 on random input.

    A candidate whose hidden size the module does not take (two projections read backwards) has an infinite error.
    """
    probe = copy.deepcopy(module).eval().float()
    sizes = [paths.read(probe).up.in_features for paths in candidates]
    references = {size: _run_probe(probe, candidates[sizes.index(size)]) for size in dict.fromkeys(sizes)}
    if not any(references.values()):
        raise ValueError(
            f"`ffn` must be callable with one tensor [tokens, hidden] and return that shape; {type(module).__name__} "
            f"is not, for no hidden size of its projections ({', '.join(map(str, references))})."
        )
    errors = []
    for size, paths in zip(sizes, candidates, strict=True):
        reference = references[size]
        if reference is None:
            errors.append(math.inf)
            continue
        x, expected = reference
        ffn = paths.read(probe)
        got = apply_ffn(x, ffn, ffn.activation)
        norm = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
        errors.append(((got - expected).norm() / norm).item())
    return errors


def _run_probe(probe: nn.Module, paths: FFNPaths) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Random input and the module's output for it; None if the module does not take it or changes its shape.

    The input is scaled so that the pre-activations are of order one, where the activations differ most.
    """
    up = paths.read(probe).up
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(_PROBE_TOKENS, up.in_features, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(up.weight.device)
    x = x / up(x).std().clamp_min(1e-6)
    try:
        out = probe(x)
    except (RuntimeError, TypeError):
        return None
    return (x, out) if isinstance(out, torch.Tensor) and out.shape == x.shape else None


def _check_alike_in_training(module: nn.Module, paths: FFNPaths) -> None:
    """Raises ValueError if the module, known to be the FFN of `paths` in eval mode, computes otherwise in training.

    That finds dropout which is no module of its own (`nn.functional.dropout` in a forward).
    """
    probe = copy.deepcopy(module).eval().float()
    proven = _run_probe(probe, paths)
    assert proven is not None, "the module of a candidate that fits has been run"
    x, expected = proven
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        got = probe.train()(x)
    if (got - expected).norm() > _PROBE_TOLERANCE * expected.norm():
        raise ValueError(
            f"`ffn` must compute the same in training as in evaluation, and {type(module).__name__} does not (an "
            "active dropout?); an expert has none inside. Set it to 0 and, if you want dropout, apply it to the FFN's "
            "output."
        )
