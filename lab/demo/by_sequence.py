"""The recommended way through a recipe: whole sequences to experts, their mean merged, the members distilled into it.

Loops are `training.py`'s, what both ways share `job.py`'s.
"""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ummrm import merge, save_pretrained

from ..tasks import concatenate
from . import measure
from .job import Job
from .stages import DISTILLED, LONGER, MERGED, MOE, Members, RecipeResult, freeze, start_merge
from .training import distil, member_scores_of, teacher_targets


class BySequence(Job):
    """Dense, upcycle, train, merge by the mean (or learned weights), distil, export, reload."""

    FOLDERS = ("moe", "merged", "distilled")

    def run(self) -> RecipeResult:
        config = self.config
        models, start = self.dense_models()
        moe = self.upcycled(start)
        self.train(MOE, "mixture", moe, config.moe, seed=2, num_experts=config.upcycle.num_experts)
        models[LONGER] = self.train_control(start)
        with self.timed("experts"):
            self.measure_members(moe)

        merging = copy.deepcopy(moe)
        if config.alpha is None:
            start_merge(merging, config.merge, self.task.train.chosen, config.evaluation.batch_size)
        else:
            self.learn_alpha(merging)
        mixture = moe if config.alpha is None else merging  # the mean needs no merge phase
        models |= {MOE: moe, MERGED: merge(mixture), DISTILLED: merge(mixture, card_notes=self.card_notes())}
        self.check_merged(merging, models[MERGED])
        self.distil(models[DISTILLED], moe)
        with self.timed("experts"):
            self.measure_gap(models)
        with self.timed("save"):
            for name in (MOE, MERGED, DISTILLED):
                save_pretrained(models[name], self.output / name)
        self.check_reload(models[DISTILLED], DISTILLED)
        self.measure_arms(models)
        return self.result

    def distil(self, student: PreTrainedModel, mixture: PreTrainedModel) -> None:
        """Teaches the merged model the members' mean score on the policy's answers, in place."""
        config, seed = self.config, 1000 * self.config.seed
        assert config.distill is not None
        if self.task.unlabelled is None:
            raise ValueError(f"the task {self.task.name} has no answers without labels to distil on.")
        freeze(student, config.model.frozen)
        answers, batch = self.task.unlabelled(config.distill.answers, seed + 5), config.evaluation.batch_size
        with self.stage(DISTILLED, "distillation", config.distill.steps) as told:
            history = distil(student, mixture, answers, config.distill, seed + 4, batch, **told)
        self.result.histories[DISTILLED] = history

    def card_notes(self) -> str:
        assert self.config.distill is not None
        return (
            "## Distillation\n\nAfter the merge the mixture's members, averaged, were distilled into this model: "
            f"{self.config.distill.steps} steps of {self.config.distill.batch_size} answers without labels."
        )

    def measure_members(self, moe: PreTrainedModel) -> None:
        config = self.config
        sets: list[list[measure.Accuracy]] = []
        orders = []
        for pairs in (self.task.test, self.task.shifted):
            chosen, rejected = (
                member_scores_of(moe, answers, config.evaluation.batch_size)
                for answers in (pairs.chosen, pairs.rejected)
            )
            sets.append([measure.share_right(*both) for both in zip(chosen.unbind(1), rejected.unbind(1), strict=True)])
            orders.append((chosen > rejected).t())
        disagreement = measure.mean_over_pairs(orders[0], lambda one, other: (one != other).double().mean())
        found = Members(*sets, disagreement=disagreement)
        self.result.members = found
        least = config.checks.member_disagreement
        self.check_at_least("share of held-out pairs that two members order differently", found.disagreement, least)

    def measure_gap(self, models: dict[str, PreTrainedModel]) -> None:
        evaluation = self.config.evaluation
        pairs = self.task.test.select(slice(0, evaluation.gate_pairs))
        answers = concatenate([pairs.chosen, pairs.rejected])
        mean = teacher_targets(models[MOE], answers, evaluation.batch_size)
        before, after = (
            (teacher_targets(models[name], answers, evaluation.batch_size) - mean).square().mean().sqrt().item()
            for name in (MERGED, DISTILLED)
        )
        self.result.gap = (before, after)
        least = self.config.checks.distillation_gain
        name = "distance to the members' mean lowered by distillation, held-out answers"
        self.check(name, before - after, f"more than {least:g}", before - after > least)
