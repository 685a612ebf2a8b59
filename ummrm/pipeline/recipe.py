"""What a run is made of: a recipe read from plain data, checked before any work, and its defaults.

Blocks of stages take the arguments of TRL's RewardConfig by their own names. What is recommended by docs/findings.md is
the default: whole sequences to experts, four times a dense model's training, the merge by the mean, distillation.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import DTYPES, MergeConfig, UpcycleConfig
from ..data import PairsConfig, PairSource
from ..evaluation import EvaluationConfig

HEADS = ("auto", "fresh", "keep")
WEIGHTS = ("mean", "learned")
_PROBE_PAIRS = 200  # a probe scores two texts of each by every model
_LARGEST = 64 << 10  # bytes of a recipe


class RecipeError(ValueError):
    """A recipe that can't be run: the block and field, what was expected, what is there, and the remedy."""


@dataclass(frozen=True)
class ModelSource:
    """The model that a run starts from.

    Attributes:
        path: a folder, or a name on the hub: a causal or masked language model, a backbone alone, or a reward model.
        revision: of a hub name: a branch, tag or commit.
        dtype: of the weights in training.
        head: `"auto"`: a fresh reward head where there is none; `"fresh"`: always; `"keep"`: none must be missing.
        frozen: beginnings of the names of parameters that no stage trains, such as `model.embed_tokens`.
        trust_remote_code: run Python code that comes with the model or its tokenizer, which can do whatever you can.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    head: str = "auto"
    frozen: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _require(
            "model.path", isinstance(self.path, str) and self.path.strip() != "", "a folder or hub name", self.path
        )
        _require("model.dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}", self.dtype)
        names = (self.frozen,) if isinstance(self.frozen, str) else self.frozen
        listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        _require("model.frozen", listed, "beginnings of names of parameters", self.frozen)
        object.__setattr__(self, "frozen", tuple(names))
        trusted = isinstance(self.trust_remote_code, bool)
        _require("model.trust_remote_code", trusted, "true or false", self.trust_remote_code)
        _require("model.head", self.head in HEADS, f"one of {', '.join(HEADS)}", self.head)


@dataclass(frozen=True)
class Recipe:
    """A run.

    Attributes:
        model: where it starts.
        data: its preference pairs.
        output: the folder that it leaves.
        seed: of heads, routers, orders and groups.
        training: arguments of TRL's RewardConfig for every stage that trains.
        lora: arguments of `peft.LoraConfig`; None trains all weights. Adapters are folded in when a stage is done.
        dense: those of a dense control on the same pairs; None leaves it out.
        upcycle: fields of `UpcycleConfig`; `experts_in` is `"all"` under a fresh head and `"linear"` under a trained
            one where nothing is said.
        train: arguments of the mixture's training.
        merge: `weights`, `"mean"` or `"learned"`; fields of `MergeConfig`; arguments of learning them.
        distill: `texts`, sources of texts without labels (default: the training answers); arguments of
            `UmmDistillConfig`. None leaves it out; it is there by default where sequences are assigned.
        evaluate: fields of `ummrm.evaluation.EvaluationConfig`; edits are made on 200 held-out pairs.
    """

    model: ModelSource
    data: PairsConfig
    output: str
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    dense: Mapping[str, Any] | None = None
    upcycle: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    distill: Mapping[str, Any] | None = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require("output", isinstance(self.output, str) and self.output.strip() != "", "a folder", self.output)
        _check_seed(self.seed)
        _require("merge.weights", self.merge_weights in WEIGHTS, f"one of {', '.join(WEIGHTS)}", self.merge_weights)
        if self.merge_weights == "mean":
            extra = [name for name in self.merge if name != "weights" and name not in _names(MergeConfig)]
            _require("merge", not extra, "without arguments of training where `weights` is mean", ", ".join(extra))
        texts = (self.distill or {}).get("texts", ())
        listed = isinstance(texts, (list, tuple)) and all(isinstance(one, str) for one in texts)
        _require("distill.texts", isinstance(texts, str) or listed, "a file or a list of files", texts)
        self.upcycle_config(fresh=True)
        self.merge_config()
        self.evaluation_config()

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """A recipe from plain data.

        Raises:
            RecipeError: a field that there is not, with the nearest one that there is; a value that can't be meant.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe must be a mapping of {', '.join(_names(cls))}, got {type(data).__name__}.")
        _check_names("a recipe", data, _names(cls))
        missing = [name for name in ("model", "data", "output") if data.get(name) is None]
        if missing:
            raise RecipeError(f"a recipe must have {', '.join(missing)}; `model: name`, `data: pairs.jsonl`, ...")
        given = dict(data)
        _check_seed(data.get("seed", 0))
        try:
            given["model"] = _model(data["model"])
            given["data"] = _pairs(data["data"], data.get("seed", 0))
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error
        for name in ("training", "upcycle", "train", "merge", "evaluate"):
            given[name] = _block(name, data.get(name), {})
        given |= {name: _optional(data, name, default=False) for name in ("dense", "lora")}
        upcycle = given["upcycle"]
        given["distill"] = _optional(data, "distill", default=upcycle.get("assignment", "sequence") == "sequence")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which `from_dict` reads."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        for name in ("dense", "distill", "lora"):
            if plain[name] is None:
                plain[name] = False
        return plain

    @property
    def by_sequence(self) -> bool:
        """Whether whole sequences go to experts."""
        return self.upcycle.get("assignment", "sequence") == "sequence"

    @property
    def merge_weights(self) -> str:
        """`"mean"` or `"learned"`."""
        return self.merge.get("weights", "mean" if self.by_sequence else "learned")

    def upcycle_config(self, fresh: bool) -> UpcycleConfig:
        """What becomes of a model.

        Args:
            fresh: whether its reward head is.
        """
        fields = {"assignment": "sequence", **self.upcycle}
        if fields["assignment"] == "sequence":
            own = not fields.get("num_shared_experts")  # linear experts have no shared one beside them
            fields.setdefault("experts_in", ("all" if fresh else "linear") if own else "ffn")
        try:
            return UpcycleConfig.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"upcycle: {error}") from error

    def merge_config(self) -> MergeConfig | None:
        """What is said of the merge; None: nothing."""
        fields = {name: value for name, value in self.merge.items() if name in _names(MergeConfig)}
        try:
            return MergeConfig(**fields) if fields else None
        except (TypeError, ValueError) as error:
            raise RecipeError(f"merge: {error}") from error

    def evaluation_config(self) -> EvaluationConfig:
        """What is measured of the models."""
        _check_names("`evaluate`", self.evaluate, _names(EvaluationConfig))
        try:
            return EvaluationConfig(**{"probe_pairs": _PROBE_PAIRS, "seed": self.seed, **self.evaluate})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"evaluate: {error}") from error

    def longer(self, config: UpcycleConfig) -> int:
        """How many times a dense model's training the mixture gets where nothing is said (docs/findings.md).

        Each expert sees one pair in E. From a fresh head it then sees as many as the dense model; from a trained one
        half of it was best. Experts in FFNs alone and mixtures by token got worse when they were trained for longer.
        """
        if not config.by_sequence or not config.has_linear_experts:
            return 1
        return config.num_experts if config.has_head_experts else max(1, config.num_experts // 2)

    def texts(self) -> tuple[str, ...]:
        """Sources of texts without labels; none: the training answers."""
        given = (self.distill or {}).get("texts", ())
        return (given,) if isinstance(given, str) else tuple(given)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which would take the last of equal keys in silence."""

    def construct_mapping(self, node, deep=False):
        found: list[Any] = []
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # `<<: *name`, whose keys give way to the mapping's own
                continue
            name = self.construct_object(key, deep=True)
            if name in found:
                raise ValueError(f"the key {name!r} is given twice, again in line {key.start_mark.line + 1}")
            found.append(name)
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path, **changes: Any) -> Recipe:
    """A recipe from a YAML file.

    Args:
        path: the file.
        changes: top-level fields that go before the file's.

    Raises:
        RecipeError: it is no file, too large, not YAML, or no recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"a recipe must be a YAML file, and {path} {'is none' if path.exists() else 'is not there'}.")
    if path.stat().st_size > _LARGEST:
        raise RecipeError(
            f"{path} must be a recipe of at most {_LARGEST >> 10} kB, got {path.stat().st_size >> 10} kB."
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # PyYAML raises what its constructors happen to: overflows, dates that are none
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise RecipeError(f"{path} can't be read as YAML: {said}; mend the file.") from error
    if isinstance(data, Mapping):
        data = {**data, **changes}
    try:
        return Recipe.from_dict(data)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def check_arguments(block: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises RecipeError where a block has an argument that there is not."""
    _check_names(f"`{block}`", given, list(known))


def _model(given: Any) -> ModelSource:
    if isinstance(given, ModelSource):
        return given
    if isinstance(given, Mapping):
        _check_names("`model`", given, _names(ModelSource))
        _require("model.path", "path" in given, "a folder or hub name", None)
        return ModelSource(**given)
    return ModelSource(given)


def _pairs(given: Any, seed: Any) -> PairsConfig:
    if isinstance(given, PairsConfig):
        return given
    if isinstance(given, Mapping) and "train" in given:
        _check_names("`data`", given, _names(PairsConfig))
        return PairsConfig(**{"seed": seed, **given})
    if isinstance(given, Mapping):
        _check_names("`data`", given, [*_names(PairsConfig), *_names(PairSource)])
        source = {name: value for name, value in given.items() if name in _names(PairSource)}
        rest = {name: value for name, value in given.items() if name not in source}
        return PairsConfig(train=(PairSource.of(source),), **{"seed": seed, **rest})
    return PairsConfig(train=given, seed=seed)


def _block(name: str, given: Any, default: dict[str, Any]) -> dict[str, Any]:
    if given is None:
        return default
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise RecipeError(f"`{name}` must be a mapping of arguments, got {given!r}.")
    return dict(given)


def _optional(data: Mapping[str, Any], name: str, *, default: bool) -> dict[str, Any] | None:
    """A block that a stage can do without: `true`, `false` or its arguments."""
    given = data.get(name)
    given = default if given is None and name not in data else given
    if given is False or given is None:
        return None
    return {} if given is True else _block(name, given, {})


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _check_names(what: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = (
                f"; did you mean `{close[0]}`?"
                if close
                else f"; there are {', '.join(known)}."
                if len(known) < 20
                else "."
            )
            raise RecipeError(f"{what} has no field `{name}`{hint}")


def _check_seed(seed: Any) -> None:
    sound = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**31
    _require("seed", sound, "an integer from 0 to 2^31 - 1", seed)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _require(name: str, holds: bool, expected: str, value: Any) -> None:
    if not holds:
        raise RecipeError(f"`{name}` must be {expected}, got {value!r}.")
