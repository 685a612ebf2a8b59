"""The configuration of a recipe: frozen dataclasses, read from YAML, every unknown or ill-typed field an error.

Says what a run does; how is `run.py`'s business.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from transformers import CONFIG_MAPPING, AutoConfig

from ummrm import MergeConfig, UpcycleConfig

from ..reading import build, near, read_yaml, require
from ..tasks import SyntheticTaskConfig, TextTaskConfig

SCHEDULES = ("constant", "linear", "cosine")
STARTS = ("dense", "backbone")


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
        require(self, "steps", self.steps >= 1, "at least 1")
        require(self, "batch_size", self.batch_size >= 1, "at least 1")
        require(self, "learning_rate", self.learning_rate > 0, "above 0")
        require(self, "schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        require(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
        require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        require(self, "max_grad_norm", self.max_grad_norm > 0, "above 0")
        require(self, "evaluations", self.evaluations >= 1, "at least 1")


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distillation of the members' mean score into the merged model; its batches are answers, not pairs.

    Attributes:
        answers: how many of the policy's answers, without labels, the members score.
    """

    steps: int = 120
    answers: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "answers", self.answers >= self.batch_size, f"at least batch_size={self.batch_size}")


@dataclass(frozen=True)
class ModelConfig:
    """Where the dense reward model comes from: exactly one of `model_type`, `folder`, `package`.

    Attributes:
        model_type: build one from configuration, with random weights, e.g. `"llama"`.
        options: the configuration's fields, for `model_type`; a name or a value that it does not know is refused.
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
        if self.model_type is not None:
            check_options(self.model_type, self.options)
        elif self.options:
            raise ValueError("ModelConfig: `options` must be left out without `model_type`: a checkpoint has its own.")


def check_options(model_type: str, options: Mapping[str, Any]) -> None:
    """Refuses a model type or a field of its configuration that transformers does not know, or a value it refuses.

    `AutoConfig.for_model` itself keeps what it does not know, a misspelt field too, and builds the model without it.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"ModelConfig: `model_type` must be one that transformers knows, got {model_type!r}"
            f"{near(model_type, CONFIG_MAPPING)}."
        )
    try:
        config = AutoConfig.for_model(model_type, **copy.deepcopy(options))  # which they write into
    except Exception as error:  # what they raise differs from family to family
        said = " ".join(str(error).split())
        raise ValueError(f"ModelConfig: `options` must suit a {model_type}, and were refused: {said}") from error
    known = inspect.signature(type(config)).parameters
    # older names and those of other families are taken in; what stays as it was given is read by nobody
    if unknown := sorted(set(options) & set(vars(config)) - set(known)):
        raise ValueError(
            f"ModelConfig: `options` must be fields of {type(config).__name__}, got "
            + ", ".join(name + near(name, known) for name in unknown)
            + "."
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of every reward model.

    Attributes:
        batch_size: sequences a batch when scoring.
        latency_batch: sequences in the batch whose forward is timed.
        latency_rounds: timed rounds, of which the best counts; in each every model runs once, the order turning.
        gate_pairs: held-out pairs over which routing statistics and the experts' disagreement are measured, and scores
            of two models compared.
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
            require(self, f.name, getattr(self, f.name) >= 1, "at least 1")


@dataclass(frozen=True)
class CheckConfig:
    """What a run must show; a value outside fails the run.

    Attributes:
        dense_accuracy: range of the dense model's accuracy in distribution: learnable and not saturated.
        expert_weight_distance: least mean relative distance between the weights of two routed experts.
        expert_disagreement: least mean relative distance between the outputs of two routed experts.
        member_disagreement: by sequence: least share of held-out pairs that two members order differently.
        alpha_gain: learning alpha must lower the loss by more than this.
        distillation_gain: distillation must bring the merged model nearer to the members' mean by more than this.
        upcycled_difference: most that a freshly upcycled model's scores may differ from those of what it was made of.
        merged_difference: most that the merged model's scores may differ from the merge phase's.
        reload_difference: most that the scores of the reloaded model may differ from those of the exported one.
    """

    dense_accuracy: tuple[float, float] = (0.70, 0.95)
    expert_weight_distance: float = 0.02
    expert_disagreement: float = 0.02
    member_disagreement: float = 0.02
    alpha_gain: float = 0.0
    distillation_gain: float = 0.0
    upcycled_difference: float = 1e-4
    merged_difference: float = 1e-4
    reload_difference: float = 1e-6

    def __post_init__(self) -> None:
        low_high = len(self.dense_accuracy) == 2 and self.dense_accuracy[0] < self.dense_accuracy[1]
        require(self, "dense_accuracy", low_high, "two numbers, the lower one first")


@dataclass(frozen=True)
class RecipeConfig:
    """The main job: dense, its control, upcycle, train, merge, distil, export, reload.

    `upcycle.assignment` says which way it goes. By token, the paper's, merge weights are learned and nothing is
    distilled. By sequence the mean of the experts is merged, and the members are distilled into it.

    Attributes:
        name: for titles and logs.
        task: the preference task, `kind: synthetic` or `kind: text`.
        model: where the dense model comes from.
        seed: of data, initialisation, data order and dropout.
        threads: torch threads; None leaves them as they are.
        device: where models run.
        start: what is upcycled: `"dense"`, the trained dense model, or `"backbone"`, the model before any training
            with the same fresh head.
        dense: training of the dense model.
        upcycle: `ummrm.UpcycleConfig`.
        moe: training of the mixture. The control starts where the mixture does and sees the same batches, over as many
            steps as the mixture's training and the learning of alpha together: from the dense model with the mixture's
            settings, from the backbone at the dense model's learning rate.
        merge: `ummrm.MergeConfig`.
        alpha: learning of the merge weights: by token always, by sequence only where it is given.
        distill: by sequence: distillation; by token None.
        evaluation: what is measured.
        checks: what must come out.
    """

    name: str
    task: Annotated[SyntheticTaskConfig | TextTaskConfig, Field(discriminator="kind")]
    model: ModelConfig
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    start: str = "dense"
    dense: TrainConfig = TrainConfig()
    upcycle: UpcycleConfig = UpcycleConfig()
    moe: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    alpha: TrainConfig | None = None
    distill: DistillConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    checks: CheckConfig = CheckConfig()

    def __post_init__(self) -> None:
        require(self, "start", self.start in STARTS, "one of " + ", ".join(STARTS))
        if self.upcycle.by_sequence:
            if self.distill is None:
                object.__setattr__(self, "distill", DistillConfig())
            if self.alpha is None and self.merge != MergeConfig():
                raise ValueError(
                    "RecipeConfig: `merge` must be left out by sequence without `alpha`: the members' mean is merged, "
                    "and nothing of it is learned; add an `alpha` section to learn merge weights."
                )
        elif self.distill is not None:
            raise ValueError(
                'RecipeConfig: `distill` must be left out with upcycle.assignment="token": no such mixture has members '
                "to learn from."
            )
        elif self.alpha is None:
            object.__setattr__(self, "alpha", TrainConfig(schedule="constant", weight_decay=0.0))

    @property
    def control(self) -> TrainConfig:
        """How the control is trained, which is the mixture's equal in steps and batches."""
        steps = self.moe.steps + (0 if self.alpha is None else self.alpha.steps)
        settings = dataclasses.replace(self.moe, steps=steps)
        if self.start == "backbone":
            settings = dataclasses.replace(settings, learning_rate=self.dense.learning_rate)
        return settings

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecipeConfig:
        """Builds a recipe from plain data, as YAML gives it.

        Raises:
            ValueError: an unknown field, a missing one, a wrong type or value; names the field by its path.
        """
        return build(cls, data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "upcycle": plain_upcycle(self.upcycle)}


def load_recipe(source: str | Path) -> RecipeConfig:
    """Reads a recipe from a YAML file, or one of ours by name (`shipped_recipes`).

    Raises:
        FileNotFoundError: there is neither such a file nor such a name.
        ValueError: it is not YAML, or not a recipe; says where.
    """
    path = Path(source)
    if not path.is_file():
        shipped = shipped_recipes()
        if str(source) not in shipped:
            raise FileNotFoundError(f"no recipe at {source}, and none is shipped by that name: {', '.join(shipped)}.")
        path = shipped[str(source)]
    return read_yaml(path, RecipeConfig.from_dict)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the laboratory, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def plain_upcycle(config: UpcycleConfig) -> dict[str, Any]:
    """A configuration as plain data, without the fields that have no meaning in its assignment.

    By token without the assignment too: studies from before there was another one say the same.
    """
    has_value = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    if config.assignment == "token":
        del has_value["assignment"]
        has_value["router_noise"] = config.router_noise  # where None is a value
    return has_value
