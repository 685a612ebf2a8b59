"""Runs a recipe from data to report: the product's main job, end to end.

Trains and measures; what is drawn and written is `report.py`'s and `plots.py`'s business.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ummrm import auxiliary_loss, merge, merge_coefficients, record_routing_statistics, save_pretrained, upcycle

from ..best_of_n import best_of_n, standardised
from ..files import prepare_output
from ..tasks import Task, concatenate
from . import measure
from .config import RecipeConfig, TrainConfig
from .plots import PLOTS
from .reload import Reload, reload_without_ummrm
from .stages import (
    ARMS,
    DENSE,
    LONGER,
    MERGED,
    MOE,
    REPORT_FILES,
    ArmResult,
    Check,
    build_dense,
    build_task,
    start_merge,
)
from .training import History, train


@dataclass
class RecipeResult:
    """Everything that a run found; `report.write_report` writes it.

    Attributes:
        config: the recipe.
        task_facts: measured properties of the data.
        arms: arm name to its measurements.
        histories: training stage to its losses; `dense_longer` and `moe` start where `dense` ended, `alpha` where
            `moe` ended.
        routed_share: FFN name to each routed expert's share of the slots.
        shared_weight: FFN name to the shared experts' mean gate weight.
        coefficients: FFN name to the merge coefficients [projections, S + E].
        specialisation: how different the routed experts ended.
        alpha_loss: preference loss of the merged forward with uniform and with learned merge weights, on the same
            training pairs.
        uniform_accuracy: test set name to accuracy of the merged model with uniform merge weights.
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
    specialisation: measure.Specialisation | None = None
    alpha_loss: tuple[float, float] = (float("nan"), float("nan"))
    uniform_accuracy: dict[str, float] = field(default_factory=dict)
    reload: Reload | None = None
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run_recipe(config: RecipeConfig, output: str | Path, progress: bool = True) -> RecipeResult:
    """Runs the main job and exports the mixture and the merged model to `output`.

    Args:
        config: the recipe.
        output: folder for the models, `moe/` and `merged/`; made if missing.
        progress: show progress bars.

    Returns:
        Everything found, the outcome of each check included: a check that failed does not raise here.

    Raises:
        ValueError: the folder cannot be used.
        ReloadError: stock transformers could not load the exported model without ummrm.
    """
    output = prepare_output(output, ("moe", "merged"), [*REPORT_FILES, *(f"{name}.png" for name in PLOTS)])
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    bars = Progress(
        TextColumn("{task.description:<20}"),  # short, so that 80 columns leave room for all
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not progress,
    )
    with quiet_transformers():
        try:
            with bars:
                return _Run(config, output, bars).run()
        finally:
            torch.set_num_threads(threads)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars, which would break ours up."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class _Run:
    def __init__(self, config: RecipeConfig, output: Path, bars: Progress) -> None:
        self.config, self.output, self.bars = config, output, bars
        self.result = RecipeResult(config, build_task(config))
        self.task = self.result.task

    def run(self) -> RecipeResult:
        config, result = self.config, self.result
        models: dict[str, PreTrainedModel] = {}
        models[DENSE] = build_dense(config.model, self.task, config.seed, config.device)
        self.train(DENSE, "dense", models[DENSE], config.dense, seed=1)

        models[LONGER] = copy.deepcopy(models[DENSE])
        torch.manual_seed(config.seed)
        moe = upcycle(models[DENSE], config.upcycle, copy=True)
        self.check_upcycled(models[DENSE], moe)
        self.train(MOE, "mixture", moe, config.moe, seed=2, auxiliary=auxiliary_loss)
        as_long = TrainConfig(**{**vars(config.moe), "steps": config.moe.steps + config.alpha.steps})
        self.train(LONGER, "dense, continued", models[LONGER], as_long, seed=2)

        self.measure_experts(moe)
        models[MOE] = copy.deepcopy(moe)
        with self.timed("save"):
            moe.save_pretrained(self.output / "moe")
        self.learn_alpha(moe)
        models[MERGED] = merge(moe)
        self.check_merged(moe, models[MERGED])
        with self.timed("save"):
            save_pretrained(models[MERGED], self.output / "merged")
        self.check_reload(models[MERGED])
        self.measure_arms(models)
        return result

    # ---- stages ----------------------------------------------------------------------------------------------

    def train(
        self, name: str, description: str, model: PreTrainedModel, stage: TrainConfig, seed: int, **kwargs
    ) -> None:
        with self.timed(name), self.bar(description, stage.steps) as advance:
            self.result.histories[name] = train(
                model,
                self.task.train,
                stage,
                seed=1000 * self.config.seed + seed,
                evaluate=self.curve_accuracy,
                on_step=lambda step, loss: advance(1, f"loss {loss:.3f}"),
                **kwargs,
            )

    def learn_alpha(self, moe: PreTrainedModel) -> None:
        config, result = self.config, self.result
        pairs = self.task.train.select(slice(0, config.evaluation.alpha_pairs))
        batch = config.evaluation.batch_size
        start_merge(moe, config.merge, pairs.chosen, batch)
        with self.timed("alpha_loss"):
            start = measure.mean_loss(moe, pairs, batch)
            result.uniform_accuracy = self.curve_accuracy(moe)
        self.train("alpha", "merge weights", moe, config.alpha, seed=3)
        with self.timed("alpha_loss"):
            result.alpha_loss = (start, measure.mean_loss(moe, pairs, batch))
        result.coefficients = {name: c.tolist() for name, c in merge_coefficients(moe).items()}
        gain = result.alpha_loss[0] - result.alpha_loss[1]
        least = config.checks.alpha_gain
        self.check("loss lowered by learning alpha", gain, f"more than {least:g}", gain > least)

    def measure_experts(self, moe: PreTrainedModel) -> None:
        config, result = self.config, self.result
        pairs = self.task.test.select(slice(0, config.evaluation.gate_pairs))
        sequences = concatenate([pairs.chosen, pairs.rejected])
        with self.timed("experts"):
            with record_routing_statistics(moe) as statistics:
                measure.rewards_of(moe, sequences, config.evaluation.batch_size)
            result.routed_share = {name: share.tolist() for name, share in statistics.fractions.items()}
            result.shared_weight = dict(statistics.shared_weight)
            result.specialisation = measure.specialisation(moe, sequences, config.evaluation.batch_size)
        weight, output = result.specialisation.mean()
        for name, value, least in (
            ("relative distance between routed experts' weights", weight, config.checks.expert_weight_distance),
            ("relative distance between routed experts' outputs", output, config.checks.expert_disagreement),
        ):
            self.check(name, value, f"at least {least:g}", value >= least)

    def measure_arms(self, models: dict[str, PreTrainedModel]) -> None:
        config, task = self.config, self.task
        batch, policy = config.evaluation.batch_size, task.policy
        latency_batch = task.test.chosen.select(slice(0, config.evaluation.latency_batch)).inputs(config.device)
        with self.timed("latency"):
            latency = measure.forward_latency(models, latency_batch, config.evaluation.latency_rounds)
        with self.timed("evaluation"):
            total = len(policy.sequences) + 2 * (len(task.test) + len(task.shifted))
            with self.bar("measure all four", len(models) * total) as advance:
                for name, model in models.items():
                    proxy = measure.rewards_of(model, policy.sequences, batch, lambda n: advance(n, ARMS[name]))  # noqa: B023
                    test, shifted = (measure.accuracy(model, pairs, batch) for pairs in (task.test, task.shifted))
                    advance(2 * (len(task.test) + len(task.shifted)), ARMS[name])
                    self.result.arms[name] = ArmResult(
                        test,
                        shifted,
                        measure.parameter_count(model),
                        latency[name],
                        best_of_n(standardised(proxy.view_as(policy.gold)), policy.gold, policy.shortcut),
                    )
        low, high = config.checks.dense_accuracy
        value = self.result.arms[DENSE].test.value
        self.check("accuracy of the dense model in distribution", value, f"{low:g} to {high:g}", low <= value <= high)

    # ---- checks ----------------------------------------------------------------------------------------------

    def check(self, name: str, value: float | str, expected: str, passed: bool) -> None:
        self.result.checks.append(Check(name, value, expected, bool(passed)))

    def check_upcycled(self, dense: PreTrainedModel, moe: PreTrainedModel) -> None:
        if self.config.upcycle.expert_noise == 0:
            limit = self.config.checks.upcycled_difference
            self.check_difference("scores of the upcycled model before training against dense", dense, moe, limit)

    def check_merged(self, moe: PreTrainedModel, merged: PreTrainedModel) -> None:
        limit = self.config.checks.merged_difference
        self.check_difference("scores of the merged model against the merge phase", moe, merged, limit)

    def check_difference(self, name: str, one: PreTrainedModel, other: PreTrainedModel, limit: float) -> None:
        sequences = self.task.test.chosen.select(slice(0, self.config.evaluation.gate_pairs))
        batch = self.config.evaluation.batch_size
        one.eval(), other.eval()
        ours, theirs = (measure.rewards_of(model, sequences, batch) for model in (one, other))
        difference = (ours - theirs).abs().max().item()
        self.check(f"{name}, largest difference", difference, f"at most {limit:g}", difference <= limit)

    def check_reload(self, merged: PreTrainedModel) -> None:
        evaluation, limit = self.config.evaluation, self.config.checks.reload_difference
        sequences = self.task.test.chosen.select(slice(0, evaluation.gate_pairs))
        with self.timed("reload"), self.bar("reload without ummrm", 1) as advance:
            found = reload_without_ummrm(merged, self.output / "merged", sequences, evaluation.batch_size)
            advance(1, "scored")
        self.result.reload = found
        name = "scores of the exported model reloaded without ummrm, largest difference"
        self.check(name, found.difference, f"at most {limit:g}", found.difference <= limit)

    # ---- helpers ---------------------------------------------------------------------------------------------

    def curve_accuracy(self, model: PreTrainedModel) -> dict[str, float]:
        count, batch = self.config.evaluation.curve_pairs, self.config.evaluation.batch_size
        sets = {"test": self.task.test, "shifted": self.task.shifted}
        return {
            name: measure.accuracy(model, pairs.select(slice(0, count)), batch).value for name, pairs in sets.items()
        }

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int, str], None]]:
        row = self.bars.add_task(description, total=total, note="")
        yield lambda count, note: self.bars.update(row, advance=count, note=note)
        self.bars.update(row, completed=total)
