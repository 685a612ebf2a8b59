"""What a user may choose about upcycling and merging: two frozen, validated dataclasses.

Both are plain data (JSON in a model's config.json). They know nothing of torch modules; `nn`, `upcycle.py` and
`merge.py` give them their meaning. docs/method.md has the mathematics they select: the router and gates of UMM-RM
(arXiv 2512.00724) and XFT (arXiv 2404.15247).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn, TypeGuard, TypeVar

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""What weights may be computed and saved in, by torch's names, and bytes of a number."""
ASSIGNMENTS = ("token", "sequence")
EXPERTS_IN = ("ffn", "linear", "all")
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


# What is chosen where nothing is said, by assignment; a field that is missing in one has no meaning there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "token": {
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "num_shared_experts": 1,
        "fixed_shared_weight": 0.5,
        "gate": "shared_complement",
        "router": "linear",
        "router_noise": None,
        "jitter_eps": 0.01,
        "router_init_std": 0.02,
        "balancing_loss": "switch",
        "balancing_loss_coef": 0.01,
        "z_loss_coef": 0.001,
    },
    "sequence": {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "num_shared_experts": 0,
        "fixed_shared_weight": 0.5,
        "experts_in": "ffn",
        "evaluation": "mean",
    },
}


def _by_assignment() -> Any:
    """A field whose default follows from the assignment: None until then, and where it has no meaning."""
    return field(default=None)


@dataclass(frozen=True)
class UpcycleConfig(_Config):
    """How dense FFNs become experts, and how experts get their tokens.

    `assignment="token"` is UMM-RM (arXiv 2512.00724): a router sends each token to K of E routed experts, beside an
    always-on shared expert. The paper's "8 experts, top-6" counts the shared expert: `num_experts=7,
    num_experts_per_tok=5`. `assignment="sequence"` sends every sequence of a batch through one expert, drawn anew each
    step, so that the mixture is an ensemble of E members that share everything but their experts (docs/method.md).

    A field that is not given has the default of its assignment; one that belongs to the other assignment is an error.

    Attributes:
        assignment: `"token"` or `"sequence"`.
        num_experts: E, routed experts, at least 1; 7, by sequence 4.
        num_experts_per_tok: K, routed experts per token, 1 to E; 5, by sequence always 1.
        num_shared_experts: S, shared experts, which every token goes through, at least 1; 1, by sequence 0.
        fixed_shared_weight: the shared experts' gate weight under `gate="fixed"` and by sequence, 0 to 1; 0.5.
        gate: by token: how the gate weights follow from the router: `"shared_complement"` (the default; XFT, arXiv
            2404.15247: the shared experts' is 1 - p_(1)) or `"fixed"` (it is `fixed_shared_weight`).
        router: by token: `"linear"` (one linear map, the default) or `"mlp"` (linear, tanh, linear).
        router_noise: by token: `None`, `"jitter"` (input scaled by uniform noise, Switch Transformer, arXiv 2101.03961)
            or `"learned"` (noisy top-k, arXiv 1701.06538); in training only.
        jitter_eps: by token: half-width of the jitter's uniform distribution, 0 to 1; 0.01.
        router_init_std: by token: standard deviation of the router's normal initialisation; 0.02.
        balancing_loss: by token: `"switch"` (arXiv 2101.03961, eq. 4; the default) or `"cv_squared"` (XFT).
        balancing_loss_coef: by token: weight of the load-balancing loss, at least 0; 0.01.
        z_loss_coef: by token: weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), at least 0; 0.001.
        experts_in: by sequence: what is copied for each expert: `"ffn"` (the FFNs, the default), `"linear"` (every
            linear layer of the chosen layers, attention's too) or `"all"` (these and the last linear map of the reward
            head, which `ummrm.upcycle(..., new_head=True)` draws anew for each; reward models only); the last two
            without shared experts.
        evaluation: by sequence: what a forward without `groups` computes outside training: `"mean"` (the default: the
            members' scores, averaged after the head; reward models only) or the number of one member.
        layers: which layers are upcycled: `"all"`, an integer n (every n-th: n-1, 2n-1, ...), or a sequence of indices.
        expert_noise: noise added to each routed expert at upcycling, as a multiple of each tensor's own standard
            deviation; 0 keeps the upcycled model equal to the dense one. Fresh heads of experts get none.
    """

    assignment: str = "token"
    num_experts: int = _by_assignment()
    num_experts_per_tok: int = _by_assignment()
    num_shared_experts: int = _by_assignment()
    fixed_shared_weight: float = _by_assignment()
    gate: str = _by_assignment()
    router: str = _by_assignment()
    router_noise: str | None = _by_assignment()
    jitter_eps: float = _by_assignment()
    router_init_std: float = _by_assignment()
    balancing_loss: str = _by_assignment()
    balancing_loss_coef: float = _by_assignment()
    z_loss_coef: float = _by_assignment()
    experts_in: str = _by_assignment()
    evaluation: str | int = _by_assignment()
    layers: str | int | Sequence[int] = "all"
    expert_noise: float = 0.0

    def __post_init__(self) -> None:
        self._check_choice("assignment", ASSIGNMENTS)
        self._resolve()
        self._check_int("num_experts", 1)
        self._check_int("num_experts_per_tok", 1)
        self._check_int("num_shared_experts", 0 if self.by_sequence else 1)
        self._check_real("fixed_shared_weight", 0, 1)
        if self.by_sequence:
            self._check_sequence()
        else:
            self._check_token()
        self._check_real("expert_noise", 0)
        self._check_layers()

    @property
    def by_sequence(self) -> bool:
        """Whether `assignment` is `"sequence"`."""
        return self.assignment == "sequence"

    @property
    def has_linear_experts(self) -> bool:
        """Whether every linear layer of a chosen layer is copied for each expert, and not its FFN alone."""
        return self.experts_in in ("linear", "all")

    @property
    def has_head_experts(self) -> bool:
        """Whether each expert has a reward head of its own."""
        return self.experts_in == "all"

    @property
    def default_shared_share(self) -> float:
        """The lambda that a merge has where none is given: 0.5; by sequence the shared experts' gate weight."""
        if not self.by_sequence:
            return 0.5
        return float(self.fixed_shared_weight) if self.num_shared_experts else 0.0

    def _resolve(self) -> None:
        defaults = _DEFAULTS[self.assignment]
        other = next(name for name in ASSIGNMENTS if name != self.assignment)
        for name in _DEFAULTS["token"] | _DEFAULTS["sequence"]:
            value = getattr(self, name)
            if name not in defaults and value is not None:
                _fail(self, name, f'left out with assignment="{self.assignment}": it belongs to "{other}"', value)
            if value is None:
                object.__setattr__(self, name, defaults.get(name))

    def _check_token(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            _fail(
                self,
                "num_experts_per_tok",
                f"at most num_experts={self.num_experts} (the shared expert is not counted in either)",
                self.num_experts_per_tok,
            )
        self._check_choice("gate", GATES)
        self._check_choice("router", ROUTERS)
        self._check_choice("router_noise", ROUTER_NOISES)
        self._check_real("jitter_eps", 0, 1)
        self._check_real("router_init_std", 0)
        self._check_choice("balancing_loss", BALANCING_LOSSES)
        self._check_real("balancing_loss_coef", 0)
        self._check_real("z_loss_coef", 0)

    def _check_sequence(self) -> None:
        if self.num_experts_per_tok != 1:
            _fail(
                self,
                "num_experts_per_tok",
                "1 by sequence: a sequence goes through one expert",
                self.num_experts_per_tok,
            )
        self._check_choice("experts_in", EXPERTS_IN)
        if self.has_linear_experts and self.num_shared_experts:
            _fail(
                self,
                "num_shared_experts",
                f'by sequence 0 with experts_in="{self.experts_in}"',
                self.num_shared_experts,
            )
        member = _is_int(self.evaluation) and 0 <= self.evaluation < self.num_experts
        if not member and self.evaluation != "mean":
            _fail(self, "evaluation", f'"mean" or the number of a member, 0 to {self.num_experts - 1}', self.evaluation)

    def to_dict(self) -> dict[str, Any]:
        """This configuration as JSON-ready data, without the fields of the other assignment."""
        foreign = (_DEFAULTS["token"] | _DEFAULTS["sequence"]).keys() - _DEFAULTS[self.assignment].keys()
        return {name: value for name, value in super().to_dict().items() if name not in foreign}

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
        shared_share: lambda, the shared experts' share of the merge, 0 to 1. None, the default, is 0.5, which the paper
            finds best (XFT used 0.75); for a mixture assigned by sequence the weight that its shared experts had, 0
            without any. With `learn_shared_share` it is the starting value and must lie strictly between 0 and 1.
        learn_shared_share: learn lambda too, as `sigmoid(l)` with one scalar l for the model.
        alpha_init: where the merge logits alpha [E] of a layer start: `"uniform"`, or `"routing"`: softmax(alpha) is
            each expert's share of the routed gate weight in measured routing statistics
            (`record_routing_statistics`).
        alpha_per: `"layer"` (one alpha for the whole FFN) or `"projection"` (one for each of gate, up and down).
    """

    shared_share: float | None = None
    learn_shared_share: bool = False
    alpha_init: str = "uniform"
    alpha_per: str = "layer"

    def __post_init__(self) -> None:
        if self.shared_share is not None:
            self._check_real("shared_share", 0, 1)
        self._check_bool("learn_shared_share")
        self._check_choice("alpha_init", ALPHA_INITS)
        self._check_choice("alpha_per", ALPHA_GRANULARITIES)
        if self.learn_shared_share and self.shared_share in (0, 1):
            _fail(self, "shared_share", "strictly between 0 and 1 when learn_shared_share is True", self.shared_share)

    def resolved(self, upcycling: UpcycleConfig) -> MergeConfig:
        """This configuration with a number as lambda, for a mixture made by `upcycling`.

        Raises:
            ValueError: it can't be merged so: without shared experts lambda is 0, by sequence nothing was routed.
        """
        share = upcycling.default_shared_share if self.shared_share is None else self.shared_share
        if not upcycling.num_shared_experts and self.learn_shared_share:
            _fail(self, "learn_shared_share", "False for a mixture without shared experts", True)
        if not upcycling.num_shared_experts and share:
            _fail(self, "shared_share", "0 for a mixture without shared experts", share)
        if upcycling.by_sequence and self.alpha_init == "routing":
            _fail(
                self, "alpha_init", '"uniform" for a mixture assigned by sequence, which has no router', self.alpha_init
            )
        return replace(self, shared_share=float(share))
