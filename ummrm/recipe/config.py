"""The configuration of a recipe: frozen dataclasses, read from YAML, every unknown or ill-typed field an error.

Says what a run does; how is `run.py`'s business.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import MergeConfig, UpcycleConfig
from ..tasks import SyntheticTaskConfig, TextTaskConfig

SCHEDULES = ("constant", "linear", "cosine")


def _require(owner: object, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {expected}, got {getattr(owner, name)!r}.")


@dataclass(frozen=True)
class TrainConfig:
    """One training stage, by AdamW.

    Attributes:
        steps: optimiser steps.
        batch_size: pairs a step.
        learning_rate: peak learning rate.
        schedule: `"constant"`, `"linear"` or `"cosine"`, to zero after the warm-up.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's; alpha and other vectors and scalars are exempt.
        max_grad_norm: gradient clipping.
        evaluations: how often held-out accuracy is measured during the stage, evenly spread, the end included.
    """

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    evaluations: int = 5

    def __post_init__(self) -> None:
        _require(self, "steps", self.steps >= 1, "at least 1")
        _require(self, "batch_size", self.batch_size >= 1, "at least 1")
        _require(self, "learning_rate", self.learning_rate > 0, "above 0")
        _require(self, "schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        _require(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
        _require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _require(self, "max_grad_norm", self.max_grad_norm > 0, "above 0")
        _require(self, "evaluations", self.evaluations >= 1, "at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """Where the dense reward model comes from: exactly one of `model_type`, `folder`, `package`.

    Attributes:
        model_type: build one from configuration, with random weights, e.g. `"llama"`.
        options: the configuration's fields, for `model_type`.
        folder: load a Hugging Face folder or hub name.
        package: load the Hugging Face folder that an installed Python package carries.
        package_folder: where in the package it is.
        frozen: parameters whose name starts with one of these are not trained.
    """

    model_type: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    package: str | None = None
    package_folder: str = "model"
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("model_type", "folder", "package") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "ModelConfig: exactly one of `model_type`, `folder`, `package` must be given, "
                f"got {', '.join(given) or 'none'}."
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of every reward model.

    Attributes:
        batch_size: sequences a batch when scoring.
        latency_batch: sequences in the batch whose forward is timed.
        latency_rounds: timed rounds; in each every model runs once, the order turning.
        gate_pairs: held-out pairs over which gate usage and the experts' disagreement are measured.
        alpha_pairs: training pairs on which the merge loss before and after learning alpha is compared.
        curve_pairs: held-out pairs for the accuracies along the training curves; the table uses all.
    """

    batch_size: int = 256
    latency_batch: int = 64
    latency_rounds: int = 15
    gate_pairs: int = 256
    alpha_pairs: int = 1024
    curve_pairs: int = 512

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _require(self, f.name, getattr(self, f.name) >= 1, "at least 1")


@dataclass(frozen=True)
class CheckConfig:
    """What a run must show; a value outside fails the run.

    Attributes:
        dense_accuracy: range of the dense model's accuracy in distribution: learnable and not saturated.
        expert_weight_distance: least mean relative distance between the weights of two routed experts.
        expert_disagreement: least mean relative distance between the outputs of two routed experts.
        alpha_gain: learning alpha must lower the loss by more than this.
        upcycled_difference: most that a freshly upcycled model's scores may differ from the dense model's.
        merged_difference: most that the merged model's scores may differ from the merge phase's.
        reload_difference: most that the scores of the reloaded model may differ from those of the exported one.
    """

    dense_accuracy: tuple[float, float] = (0.70, 0.95)
    expert_weight_distance: float = 0.02
    expert_disagreement: float = 0.02
    alpha_gain: float = 0.0
    upcycled_difference: float = 1e-4
    merged_difference: float = 1e-4
    reload_difference: float = 1e-6

    def __post_init__(self) -> None:
        low_high = len(self.dense_accuracy) == 2 and self.dense_accuracy[0] < self.dense_accuracy[1]
        _require(self, "dense_accuracy", low_high, "two numbers, the lower one first")


@dataclass(frozen=True)
class RecipeConfig:
    """The main job: dense, dense trained equally long, upcycle, train, learn alpha, merge, export, reload.

    Attributes:
        name: for titles and logs.
        task: the preference task, `kind: synthetic` or `kind: text`.
        model: where the dense model comes from.
        seed: of data, initialisation, data order and dropout.
        threads: torch threads; None leaves them as they are.
        device: where models run.
        dense: training of the dense model.
        upcycle: `ummrm.UpcycleConfig`.
        moe: training of the mixture; the control "dense, trained equally long" takes the same settings, over as many
            steps as the mixture's training and the learning of alpha together.
        merge: `ummrm.MergeConfig`.
        alpha: learning of the merge weights.
        evaluation: what is measured.
        checks: what must come out.
    """

    name: str
    task: SyntheticTaskConfig | TextTaskConfig
    model: ModelConfig
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    dense: TrainConfig = TrainConfig()
    upcycle: UpcycleConfig = UpcycleConfig()
    moe: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    alpha: TrainConfig = TrainConfig(schedule="constant", weight_decay=0.0)
    evaluation: EvaluationConfig = EvaluationConfig()
    checks: CheckConfig = CheckConfig()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecipeConfig:
        """Builds a recipe from plain data, as YAML gives it.

        Raises:
            ValueError: an unknown field, a missing one, a wrong type or value; names the field by its path.
        """
        return _build(cls, data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        data = dataclasses.asdict(self)
        data["task"] = {"kind": _KINDS[type(self.task)], **data["task"]}
        return data


_KINDS = {SyntheticTaskConfig: "synthetic", TextTaskConfig: "text"}


def load_recipe(path: str | Path) -> RecipeConfig:
    """Reads a recipe from a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not a recipe; says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; recipes of this project lie in its folder recipes/.")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    try:
        return RecipeConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _build(cls: type, data: Any, where: str):
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping of fields, got {data!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(map(str, data)) - set(known))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(unknown)}; it has {', '.join(known)}.")
    required = [
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    try:
        return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str):
    """`value` as the annotated type; YAML's quirks (1e-3 is a string, lists for tuples) are undone here."""
    if hint == SyntheticTaskConfig | TextTaskConfig:
        return _build_task(value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, got {value!r}.")
        return dict(value)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint]
    raise ValueError(f"{where} must be {name}, got {value!r}.")


def _convert_union(arguments: tuple, value: Any, where: str):
    if value is None and type(None) in arguments:
        return None
    errors = []
    for argument in arguments:
        if argument is not type(None):
            try:
                return _convert(argument, value, where)
            except ValueError as error:
                errors.append(str(error))
    raise ValueError(" Or: ".join(errors))


def _build_task(value: Any, where: str):
    kinds = {kind: cls for cls, kind in _KINDS.items()}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in kinds:
        raise ValueError(f"{where}.kind must be one of {', '.join(kinds)}, got {kind!r}.")
    return _build(kinds[kind], {k: v for k, v in value.items() if k != "kind"}, where)
