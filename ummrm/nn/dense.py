"""What a dense FFN is to ummrm: its projections, its activation and their shapes, read from a module.

`layers.py` copies experts from what is read here and writes merged weights back through it. How a module that nobody
described is recognised is `probe.py`'s business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.reference import ACTIVATIONS
from .parallel import shape_of

PROJECTIONS = ("gate", "up", "down")  # of an FFN, in the order of their merge coefficients; a plain one has no gate

_transposed: list[type[nn.Module]] = []  # linear maps whose weight is stored as [in, out]
_PATH = re.compile(r"(?P<path>[^\[\]]*)(\[(?P<half>[01])\])?")


def register_transposed_linear(kind: type[nn.Module]) -> None:
    """Makes `kind` a linear map that an FFN may be made of: `weight` [in, out], `bias` [out] or None."""
    if kind not in _transposed:
        _transposed.append(kind)


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, tuple(_transposed))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be a projection: an `nn.Linear`, or of a kind given to `register_transposed_linear`."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


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
        """Projections that merge coefficients can tell apart: the last so many of `PROJECTIONS`."""
        return len(PROJECTIONS) if self.glu else len(PROJECTIONS) - 1


@dataclass(frozen=True)
class Projection:
    """One linear map of an FFN: a linear module, or one half of the outputs of a module that fuses two.

    Attributes:
        module: what `is_linear` says yes to.
        half: None for the whole module, 0 for the first half of its outputs, 1 for the second.
    """

    module: nn.Module
    half: int | None = None

    def _parameter(self, name: str) -> torch.Tensor | None:
        # a plain attribute, which need not be a registered parameter: adapters and parametrizations put tensors there
        value: Any = getattr(self.module, name)
        return value

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.half is None else tensor.chunk(2)[self.half]

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], a view of the module's parameter."""
        weight = self._parameter("weight")
        assert weight is not None
        return self._own(weight.t() if _is_transposed(self.module) else weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """[out], a view of the module's parameter, or None."""
        bias = self._parameter("bias")
        return None if bias is None else self._own(bias)

    @property
    def in_features(self) -> int:
        return self._sizes[1]

    @property
    def out_features(self) -> int:
        return self._sizes[0] // (1 if self.half is None else 2)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Of the module's whole weight, [out, in]."""
        weight = self._parameter("weight")
        assert weight is not None
        first, second = shape_of(weight)
        return (second, first) if _is_transposed(self.module) else (first, second)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def write(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Replaces the parameters of a whole module by `weight` [out, in] and `bias` [out], bit for bit."""
        assert self.half is None
        _put(self.module, "weight", weight)
        if bias is not None:
            _put(self.module, "bias", bias)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copies `weight` [out, in] and `bias` [out] into the parameters that there are, rounded to their dtype."""
        self.weight.copy_(weight)
        own = self.bias
        if own is not None and bias is not None:
            own.copy_(bias)


@dataclass(frozen=True)
class DenseFFN:
    """The linear projections of one dense FFN. `gate` is None for a plain FFN."""

    gate: Projection | None
    up: Projection
    down: Projection
    activation: str

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}; "
                "an FFN with another activation cannot be upcycled."
            )
        uses: dict[nn.Module, list[int | None]] = {}
        for _, projection in self.projections():
            uses.setdefault(projection.module, []).append(projection.half)
        if any(halves not in ([None], [0, 1], [1, 0]) for halves in uses.values()):
            raise ValueError(
                "each projection must be a module of its own, or one half of a module whose other half is another "
                "projection (`gate_up_proj[0]` and `gate_up_proj[1]`); got a half without the other, or a module twice."
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

    def projections(self) -> list[tuple[str, Projection]]:
        """(name, projection) in the order gate, up, down."""
        named = [(name, getattr(self, name)) for name in PROJECTIONS]
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
            tensors["up_bias"] = torch.cat([u.bias for u in ups if u.bias is not None])
        if self.down.bias is not None:
            tensors["down_bias"] = self.down.bias
        return tensors

    @torch.no_grad()
    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the projections' parameters by `tensors` (laid out as `fused` returns them), bit for bit."""
        ups = [projection for name, projection in self.projections() if name != "down"]
        parts = {"weight": [*zip(ups, tensors["up"].chunk(len(ups)), strict=True), (self.down, tensors["down"])]}
        parts["bias"] = []
        if self.up.bias is not None:
            parts["bias"] += zip(ups, tensors["up_bias"].chunk(len(ups)), strict=True)
        if self.down.bias is not None:
            parts["bias"].append((self.down, tensors["down_bias"]))
        for kind, pairs in parts.items():
            for module in dict.fromkeys(projection.module for projection, _ in pairs):
                own = sorted(((p.half or 0, t) for p, t in pairs if p.module is module), key=lambda pair: pair[0])
                _put(module, kind, torch.cat([tensor.detach() for _, tensor in own]))

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies `tensors` (as `fused` returns them) into the parameters that there are, rounded to their dtype."""
        ups = [projection for name, projection in self.projections() if name != "down"]
        weights = tensors["up"].chunk(len(ups))
        biases = tensors["up_bias"].chunk(len(ups)) if self.up.bias is not None else [None] * len(ups)
        for projection, weight, bias in zip(ups, weights, biases, strict=True):
            projection.fill(weight, bias)
        self.down.fill(tensors["down"], tensors.get("down_bias"))


def _put(module: nn.Module, kind: str, tensor: torch.Tensor) -> None:
    """Replaces a linear map's `weight` (given as [out, in]) or `bias`."""
    stored = tensor.detach().t() if kind == "weight" and _is_transposed(module) else tensor.detach()
    setattr(module, kind, nn.Parameter(stored.clone(memory_format=torch.contiguous_format)))


def apply_ffn(x: torch.Tensor, ffn: DenseFFN, activation: str) -> torch.Tensor:
    """The dense FFN in plain torch: x [..., H] to [..., H]."""
    act = ACTIVATIONS[activation]
    hidden = act(ffn.up(x)) if ffn.gate is None else act(ffn.gate(x)) * ffn.up(x)
    return ffn.down(hidden)


@dataclass(frozen=True)
class FFNPaths:
    """Where the projections of a dense FFN are, as dotted attribute paths; `gate` is None for a plain FFN.

    A path ends in `[0]` or `[1]` for one half of the outputs of a module that computes gate and up in one:
    `FFNPaths(gate="gate_up_proj[0]", up="gate_up_proj[1]", down="down_proj")`. `gate` is the half that the activation
    is applied to.
    """

    up: str
    down: str
    gate: str | None = None
    activation: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """The projections that there are, by name, in the order gate, up, down."""
        return {name: path for name in PROJECTIONS if (path := getattr(self, name))}

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules, each once: gate, up, down without their halves."""
        return tuple(dict.fromkeys(path.partition("[")[0] for path in self.given.values()))

    def read(self, module: nn.Module, activation: str | None = None) -> DenseFFN:
        """The FFN found at these paths below `module`.

        Raises:
            ValueError: a path leads nowhere or not to a linear map; names the path and what was found.
        """
        found: dict[str, Any] = {name: _read(name, getattr(self, name), module) for name in PROJECTIONS}
        return DenseFFN(**found, activation=activation or self.activation or "silu")


def _read(name: str, written: str | None, module: nn.Module) -> Projection | None:
    if written is None:
        return None
    match = _PATH.fullmatch(written)
    if match is None:
        raise ValueError(f"`{name}` must be a dotted path, [0] or [1] after it for one half, got {written!r}.")
    path, half = match["path"], match["half"]
    expected = f"`{name}` must be the path of an nn.Linear below {type(module).__name__}, got {path!r}"
    try:
        linear = module.get_submodule(path)
    except AttributeError:
        children = ", ".join(n for n, _ in module.named_modules() if n) or "none"
        raise ValueError(f"{expected}, which is not there; its submodules are: {children}.") from None
    if not is_linear(linear):
        raise ValueError(f"{expected}, a {type(linear).__name__}.")
    projection = Projection(linear)
    if half is not None and projection.out_features % 2:
        raise ValueError(f"{expected}, whose {projection.out_features} outputs have no halves.")
    return Projection(linear, None if half is None else int(half))
