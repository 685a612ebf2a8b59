"""What both ways of a recipe share: training a stage with a bar, measuring arms, checks, and reloading the export.

`by_token.py` and `by_sequence.py` put a run together from it.
"""

from __future__ import annotations

import abc
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from ummrm import merge_coefficients, upcycle

from ..best_of_n import best_of_n, standardised
from . import measure
from .config import RecipeConfig, TrainConfig
from .reload import reload_without_ummrm
from .stages import DENSE, LONGER, ArmResult, Check, RecipeResult, build_dense, build_task, start_merge
from .training import train


class Job(abc.ABC):
    """One run of a recipe.

    Args:
        config: the recipe.
        output: folder for the models.
        bars: where progress is shown.
    """

    FOLDERS: tuple[str, ...]  # of models, which the run writes

    def __init__(self, config: RecipeConfig, output: Path, bars: Progress) -> None:
        self.config, self.output, self.bars = config, output, bars
        self.result = RecipeResult(config, build_task(config))
        self.task = self.result.task

    @abc.abstractmethod
    def run(self) -> RecipeResult:
        """Trains, merges, exports and measures."""

    # ---- stages ----------------------------------------------------------------------------------------------

    def dense_models(self) -> tuple[dict[str, PreTrainedModel], PreTrainedModel]:
        """The trained dense model by its arm's name, and what the mixture and the control start from."""
        config = self.config
        dense = build_dense(config.model, self.task, config.seed, config.device)
        start = copy.deepcopy(dense) if config.start == "backbone" else dense
        self.train(DENSE, "dense", dense, config.dense, seed=1)
        return {DENSE: dense}, start

    def upcycled(self, start: PreTrainedModel) -> PreTrainedModel:
        """The mixture of `start`, which stays as it is."""
        torch.manual_seed(self.config.seed)
        moe = upcycle(start, self.config.upcycle, copy=True)
        if self.config.upcycle.expert_noise == 0:
            limit = self.config.checks.upcycled_difference
            name = "scores of the upcycled model before training against what it was made of"
            self.check_difference(name, start, moe, limit)
        return moe

    def train_control(self, start: PreTrainedModel) -> PreTrainedModel:
        """A dense model with as much training from `start` as the mixture has."""
        control = copy.deepcopy(start)
        self.train(LONGER, self.result.labels[LONGER].replace(" training", ""), control, self.config.control, seed=2)
        return control

    def train(
        self, name: str, description: str, model: PreTrainedModel, stage: TrainConfig, seed: int, **kwargs: Any
    ) -> None:
        """A stage of training on the preference pairs."""
        with self.stage(name, description, stage.steps) as told:
            seed = 1000 * self.config.seed + seed
            self.result.histories[name] = train(model, self.task.train, stage, seed, **told, **kwargs)

    @contextmanager
    def stage(self, name: str, description: str, steps: int) -> Iterator[dict[str, Any]]:
        """A timed stage with a bar: what its training is to be given to evaluate and to tell."""
        with self.timed(name), self.bar(description, steps) as advance:
            yield {
                "evaluate": self.curve_accuracy,
                "on_step": lambda step, loss: advance(1, f"loss {loss:.3f}"),
            }

    def learn_alpha(self, moe: PreTrainedModel) -> None:
        """Puts the mixture into its merge phase, in place, and learns its merge weights."""
        config, result = self.config, self.result
        assert config.alpha is not None
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

    def measure_arms(self, models: dict[str, PreTrainedModel]) -> None:
        """Fills in what is measured of every arm."""
        config, task, labels = self.config, self.task, self.result.labels
        batch, policy = config.evaluation.batch_size, task.policy
        latency_batch = task.test.chosen.select(slice(0, config.evaluation.latency_batch)).inputs(config.device)
        with self.timed("latency"):
            latency = measure.forward_latency(models, latency_batch, config.evaluation.latency_rounds)
        with self.timed("evaluation"):
            total = len(policy.sequences) + 2 * (len(task.test) + len(task.shifted))
            with self.bar("measure all", len(models) * total) as advance:
                for name, model in models.items():
                    proxy = measure.rewards_of(model, policy.sequences, batch, lambda n: advance(n, labels[name]))  # noqa: B023
                    test, shifted = (measure.accuracy(model, pairs, batch) for pairs in (task.test, task.shifted))
                    advance(2 * (len(task.test) + len(task.shifted)), labels[name])
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

    def check_merged(self, moe: PreTrainedModel, merged: PreTrainedModel) -> None:
        """The merged model must score as the mixture `moe` in its merge phase does."""
        limit = self.config.checks.merged_difference
        self.check_difference("scores of the merged model against the merge phase", moe, merged, limit)

    def check_difference(self, name: str, one: PreTrainedModel, other: PreTrainedModel, limit: float) -> None:
        sequences = self.task.test.chosen.select(slice(0, self.config.evaluation.gate_pairs))
        batch = self.config.evaluation.batch_size
        one.eval(), other.eval()
        ours, theirs = (measure.rewards_of(model, sequences, batch) for model in (one, other))
        difference = (ours - theirs).abs().max().item()
        self.check(f"{name}, largest difference", difference, f"at most {limit:g}", difference <= limit)

    def check_reload(self, model: PreTrainedModel, folder: str) -> None:
        """Scores with what was exported to `folder`, in a process that cannot import ummrm."""
        evaluation, limit = self.config.evaluation, self.config.checks.reload_difference
        sequences = self.task.test.chosen.select(slice(0, evaluation.gate_pairs))
        with self.timed("reload"), self.bar("reload without ummrm", 1) as advance:
            found = reload_without_ummrm(model, self.output / folder, sequences, evaluation.batch_size)
            advance(1, "scored")
        self.result.reload = found
        name = "scores of the exported model reloaded without ummrm, largest difference"
        self.check(name, found.difference, f"at most {limit:g}", found.difference <= limit)

    def check_at_least(self, name: str, value: float, least: float) -> None:
        self.check(name, value, f"at least {least:g}", value >= least)

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
