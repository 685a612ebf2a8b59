"""What a dense FFN is to ummrm: its projections, its activation and their shapes, read from a module.

`layers.py` copies experts from what is read here and writes merged weights back through it. A module whose layout
nobody named is recognised by probing: the candidates (which projection is the gate, which activation) are evaluated
on random input and compared with the module's own output, so that a wrong guess cannot pass. Knows torch only.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 1e-5  # relative; the closest pair, gelu and gelu_tanh, differ by about 1e-4 at unit pre-activations


@dataclass(frozen=True)
class FFNSpec:
    """Shape and kind of one FFN.

    Attributes:
        hidden_size: H, features in and out.
        intermediate_size: I.
        glu: gated (`act(gate) * up`) or plain (`act(up)`).
        activation: a key of `ACTIVATIONS`.
        up_bias: whether the gate and up projections have biases.
        down_bias: whether the down projection has one.
    """

    hidden_size: int
    intermediate_size: int
    glu: bool
    activation: str
    up_bias: bool
    down_bias: bool

    @property
    def up_rows(self) -> int:
        """Rows of the up-projection parameter: 2I for a gated FFN (gate rows first), else I."""
        return self.intermediate_size * (2 if self.glu else 1)

    @property
    def num_projections(self) -> int:
        """Projections that merge coefficients can tell apart: gate, up, down or up, down."""
        return 3 if self.glu else 2


@dataclass(frozen=True)
class DenseFFN:
    """The linear projections of one dense FFN. `gate` is None for a plain FFN; each weight is [out, in]."""

    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear
    activation: str

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}; "
                "an FFN with another activation cannot be upcycled."
            )
        hidden, intermediate = self.up.in_features, self.up.out_features
        expected = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        for name, linear in self.projections():
            got = (linear.out_features, linear.in_features)
            if got != expected[name]:
                raise ValueError(
                    f"the `{name}` projection must be {list(expected[name])} (out, in) to fit an up-projection of "
                    f"{[intermediate, hidden]}, got {list(got)}; an FFN must map its hidden size onto itself."
                )
        if self.gate is not None and (self.gate.bias is None) != (self.up.bias is None):
            raise ValueError(
                "the `gate` and `up` projections must both have a bias or both have none, got "
                f"gate.bias {'absent' if self.gate.bias is None else 'present'} and "
                f"up.bias {'absent' if self.up.bias is None else 'present'}; add a zero bias to the other."
            )
        kinds = {(linear.weight.dtype, linear.weight.device) for _, linear in self.projections()}
        if len(kinds) != 1:
            raise ValueError(f"all projections must share one dtype and device, got {sorted(map(str, kinds))}.")

    def projections(self) -> list[tuple[str, nn.Linear]]:
        """(name, linear) in the order gate, up, down."""
        named = [("gate", self.gate), ("up", self.up), ("down", self.down)]
        return [(name, linear) for name, linear in named if linear is not None]

    @property
    def spec(self) -> FFNSpec:
        return FFNSpec(
            hidden_size=self.up.in_features,
            intermediate_size=self.up.out_features,
            glu=self.gate is not None,
            activation=self.activation,
            up_bias=self.up.bias is not None,
            down_bias=self.down.bias is not None,
        )

    def fused(self) -> dict[str, torch.Tensor]:
        """The tensors as one expert holds them: `up` [2I or I, H] (gate rows first), `down` [H, I], and biases."""
        ups = [linear for name, linear in self.projections() if name != "down"]
        tensors = {"up": torch.cat([u.weight for u in ups]), "down": self.down.weight}
        if self.up.bias is not None:
            tensors["up_bias"] = torch.cat([u.bias for u in ups])
        if self.down.bias is not None:
            tensors["down_bias"] = self.down.bias
        return tensors

    @torch.no_grad()
    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the projections' parameters by `tensors` (laid out as `fused` returns them), bit for bit."""
        ups = [linear for name, linear in self.projections() if name != "down"]
        weights = dict(zip(ups, tensors["up"].chunk(len(ups)), strict=True)) | {self.down: tensors["down"]}
        biases: dict[nn.Linear, torch.Tensor] = {}
        if self.up.bias is not None:
            biases |= dict(zip(ups, tensors["up_bias"].chunk(len(ups)), strict=True))
        if self.down.bias is not None:
            biases[self.down] = tensors["down_bias"]
        for linear, weight in weights.items():
            linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        for linear, bias in biases.items():
            linear.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format))


def apply_ffn(x: torch.Tensor, ffn: DenseFFN, activation: str) -> torch.Tensor:
    """The dense FFN in plain torch: x [..., H] to [..., H]."""
    act = ACTIVATIONS[activation]
    hidden = act(ffn.up(x)) if ffn.gate is None else act(ffn.gate(x)) * ffn.up(x)
    return ffn.down(hidden)


@dataclass(frozen=True)
class FFNPaths:
    """Where the projections of a dense FFN are, as dotted attribute paths; `gate` is None for a plain FFN."""

    up: str
    down: str
    gate: str | None = None
    activation: str | None = None

    def read(self, module: nn.Module, activation: str | None = None) -> DenseFFN:
        """The FFN found at these paths below `module`.

        Raises:
            ValueError: a path leads nowhere or not to an `nn.Linear`; names the path and what was found.
        """
        linears = {}
        for name in ("gate", "up", "down"):
            path = getattr(self, name)
            if path is None:
                linears[name] = None
                continue
            try:
                linear = module.get_submodule(path)
            except AttributeError:
                children = ", ".join(n for n, _ in module.named_modules() if n) or "none"
                raise ValueError(
                    f"`{name}` must be the path of an nn.Linear below {type(module).__name__}, got {path!r}, which is "
                    f"not there; its submodules are: {children}."
                ) from None
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"`{name}` must be the path of an nn.Linear below {type(module).__name__}, got {path!r}, "
                    f"a {type(linear).__name__}."
                )
            linears[name] = linear
        return DenseFFN(**linears, activation=activation or self.activation or "silu")


def find_paths(module: nn.Module) -> FFNPaths:
    """Recognises an unknown FFN module by its structure, and proves it by its output.

    Args:
        module: maps [..., H] to [..., H] through two (plain) or three (gated) `nn.Linear` projections.

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
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
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
    return candidates[best]


def prove_paths(module: nn.Module, paths: FFNPaths) -> FFNPaths:
    """`paths` with its activation, if the FFN that it names computes what `module` computes.

    Raises:
        ValueError: a path is wrong, or the module computes something else (another activation, a norm inside, ...).
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
    return candidates[best]


def _candidates(linears: dict[str, nn.Linear]) -> list[FFNPaths]:
    found = []
    for down_name, down in linears.items():
        others = [n for n in linears if n != down_name]
        if any(
            (linears[n].in_features, linears[n].out_features) != (down.out_features, down.in_features) for n in others
        ):
            continue
        orders = [(None, others[0])] if len(others) == 1 else [(others[0], others[1]), (others[1], others[0])]
        found += [
            FFNPaths(gate=gate, up=up, down=down_name, activation=act) for gate, up in orders for act in ACTIVATIONS
        ]
    return found


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
        if references[size] is None:
            errors.append(math.inf)
            continue
        x, expected = references[size]
        got = apply_ffn(x, paths.read(probe), paths.activation)
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
