"""What a user may choose about upcycling and merging: two frozen, validated dataclasses.

Both are plain data (JSON in a model's config.json). They know nothing of torch modules; `nn`, `upcycle.py` and
`merge.py` give them their meaning. docs/method.md has the mathematics they select: the router and gates of UMM-RM
(arXiv 2512.00724) and XFT (arXiv 2404.15247).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, TypeGuard, TypeVar

GATES = ("shared_complement", "fixed")
ROUTERS = ("linear", "mlp")
ROUTER_NOISES = (None, "jitter", "learned")
BALANCING_LOSSES = ("switch", "cv_squared")
ALPHA_INITS = ("uniform", "routing")
ALPHA_GRANULARITIES = ("layer", "projection")

_LONGEST = 200  # characters of a value in a message: files bring values of any size

_C = TypeVar("_C", bound="_Config")


def _fail(owner: object, argument: str, expected: str, value: object) -> NoReturn:
    raise ValueError(f"{type(owner).__name__}: `{argument}` must be {expected}, got {_shown(value)}.")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of over 4300 digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[int | float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


@dataclass(frozen=True)
class _Config:
    """Checks and dict conversion shared by both configurations."""

    def _check_choice(self, name: str, allowed: tuple) -> None:
        value = getattr(self, name)
        if value not in allowed:
            _fail(self, name, "one of " + ", ".join(repr(a) for a in allowed), value)

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < minimum:
            _fail(self, name, f"an integer of at least {minimum}", value)

    def _check_real(self, name: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not _is_real(value) or not low <= value <= high:
            bound = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else f"a number of at least {low:g}"
            _fail(self, name, bound, value)

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            _fail(self, name, "True or False", getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """This configuration as JSON-ready data; `from_dict` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[_C], data: dict[str, Any]) -> _C:
        """Builds the configuration from `to_dict`'s data.

        Raises:
            TypeError: `data` is no mapping.
            ValueError: a key that this version does not know, or a value that is not allowed.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"{cls.__name__}: `data` must be a mapping of fields, got {_shown(data)}.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(key if isinstance(key, str) else _shown(key) for key in data.keys() - known)
        if unknown:
            named = ", ".join(unknown)
            raise ValueError(
                f"{cls.__name__}: unknown field(s) {named[:_LONGEST]}; known are {', '.join(sorted(known))}. "
                "A newer ummrm may have written this; upgrade ummrm or drop the field."
            )
        return cls(**data)


@dataclass(frozen=True)
class UpcycleConfig(_Config):
    """How a dense FFN becomes a mixture of experts with an always-on shared expert.

    The paper's "8 experts, top-6" counts the shared expert: `num_experts=7, num_experts_per_tok=5`.

    Attributes:
        num_experts: E, routed experts, at least 1.
        num_experts_per_tok: K, routed experts per token, 1 to E.
        num_shared_experts: S, shared experts, which every token goes through, at least 1.
        gate: how the gate weights follow from the router: `"shared_complement"` (XFT, arXiv 2404.15247: the shared
            experts' is 1 - p_(1)) or `"fixed"` (it is `fixed_shared_weight`).
        fixed_shared_weight: the shared experts' gate weight under `gate="fixed"`, 0 to 1.
        router: `"linear"` (one linear map) or `"mlp"` (linear, tanh, linear).
        router_noise: `None`, `"jitter"` (input scaled by uniform noise, Switch Transformer, arXiv 2101.03961) or
            `"learned"` (noisy top-k, arXiv 1701.06538); in training only.
        jitter_eps: half-width of the jitter's uniform distribution, 0 to 1.
        router_init_std: standard deviation of the router's normal initialisation.
        layers: which layers are upcycled: `"all"`, an integer n (every n-th: n-1, 2n-1, ...), or a sequence of indices.
        expert_noise: noise added to each routed expert at upcycling, as a multiple of each tensor's own standard
            deviation; 0 keeps the upcycled model equal to the dense one.
        balancing_loss: `"switch"` (arXiv 2101.03961, eq. 4) or `"cv_squared"` (XFT).
        balancing_loss_coef: weight of the load-balancing loss, at least 0.
        z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), at least 0.
    """

    num_experts: int = 7
    num_experts_per_tok: int = 5
    num_shared_experts: int = 1
    gate: str = "shared_complement"
    fixed_shared_weight: float = 0.5
    router: str = "linear"
    router_noise: str | None = None
    jitter_eps: float = 0.01
    router_init_std: float = 0.02
    layers: str | int | Sequence[int] = "all"
    expert_noise: float = 0.0
    balancing_loss: str = "switch"
    balancing_loss_coef: float = 0.01
    z_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        self._check_int("num_experts", 1)
        self._check_int("num_experts_per_tok", 1)
        self._check_int("num_shared_experts", 1)
        if self.num_experts_per_tok > self.num_experts:
            _fail(
                self,
                "num_experts_per_tok",
                f"at most num_experts={self.num_experts} (the shared expert is not counted in either)",
                self.num_experts_per_tok,
            )
        self._check_choice("gate", GATES)
        self._check_real("fixed_shared_weight", 0, 1)
        self._check_choice("router", ROUTERS)
        self._check_choice("router_noise", ROUTER_NOISES)
        self._check_real("jitter_eps", 0, 1)
        self._check_real("router_init_std", 0)
        self._check_real("expert_noise", 0)
        self._check_choice("balancing_loss", BALANCING_LOSSES)
        self._check_real("balancing_loss_coef", 0)
        self._check_real("z_loss_coef", 0)
        self._check_layers()

    def _check_layers(self) -> None:
        expected = '"all", a positive integer n (every n-th layer), or a non-empty sequence of distinct indices'
        layers: Any = self.layers  # whatever a file brought
        if isinstance(layers, str):
            if layers != "all":
                _fail(self, "layers", expected, layers)
        elif _is_int(layers):
            if layers < 1:
                _fail(self, "layers", expected, layers)
        else:
            try:
                indices = tuple(layers)
            except TypeError:
                _fail(self, "layers", expected, layers)
            if not indices or not all(_is_int(i) for i in indices) or len(set(indices)) != len(indices):
                _fail(self, "layers", expected, layers)
            object.__setattr__(self, "layers", indices)

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The indices, ascending, of the layers that are upcycled in a model of `num_layers` layers.

        Raises:
            ValueError: an index lies outside the model, or no layer is selected.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        if _is_int(self.layers):
            chosen = tuple(range(self.layers - 1, num_layers, self.layers))
            if not chosen:
                _fail(self, "layers", f"at most the model's {num_layers} layers, so that one is selected", self.layers)
            return chosen
        assert isinstance(self.layers, tuple)  # __post_init__ has made it one
        outside = [i for i in self.layers if not -num_layers <= i < num_layers]
        if outside:
            _fail(self, "layers", f"indices in [{-num_layers}, {num_layers - 1}] for this model", outside)
        chosen = tuple(sorted({i % num_layers for i in self.layers}))
        if len(chosen) != len(self.layers):
            _fail(self, "layers", "indices that name each layer once (negative ones count from the end)", self.layers)
        return chosen


@dataclass(frozen=True)
class MergeConfig(_Config):
    """How the experts are folded back into one dense FFN.

    `W = lambda / S * sum_s W_s + (1 - lambda) * sum_e softmax(alpha)_e W_e`, alpha learned per layer.

    Attributes:
        shared_share: lambda, the shared experts' share of the merge, 0 to 1 (the paper finds 0.5 best; XFT used
            0.75). With `learn_shared_share` it is the starting value and must lie strictly between 0 and 1.
        learn_shared_share: learn lambda too, as `sigmoid(l)` with one scalar l for the model.
        alpha_init: where the merge logits alpha [E] of a layer start: `"uniform"`, or `"routing"`: softmax(alpha) is
            each expert's share of the routed gate weight in measured routing statistics
            (`record_routing_statistics`).
        alpha_per: `"layer"` (one alpha for the whole FFN) or `"projection"` (one for each of gate, up and down).
    """

    shared_share: float = 0.5
    learn_shared_share: bool = False
    alpha_init: str = "uniform"
    alpha_per: str = "layer"

    def __post_init__(self) -> None:
        self._check_real("shared_share", 0, 1)
        self._check_bool("learn_shared_share")
        self._check_choice("alpha_init", ALPHA_INITS)
        self._check_choice("alpha_per", ALPHA_GRANULARITIES)
        if self.learn_shared_share and not 0 < self.shared_share < 1:
            _fail(self, "shared_share", "strictly between 0 and 1 when learn_shared_share is True", self.shared_share)
