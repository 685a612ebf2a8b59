"""The paper's way through a recipe: experts by token, merge weights learned, the merged model exported.

Loops are `training.py`'s, what both ways share `job.py`'s.
"""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ummrm import auxiliary_loss, merge, record_routing_statistics, save_pretrained

from ..tasks import concatenate
from . import measure
from .job import Job
from .stages import LONGER, MERGED, MOE, RecipeResult


class ByToken(Job):
    """Dense, upcycle, train, learn alpha, merge, export, reload."""

    FOLDERS = ("moe", "merged")

    def run(self) -> RecipeResult:
        models, start = self.dense_models()
        moe = self.upcycled(start)
        self.train(MOE, "mixture", moe, self.config.moe, seed=2, auxiliary=auxiliary_loss)
        models[LONGER] = self.train_control(start)

        self.measure_experts(moe)
        models[MOE] = copy.deepcopy(moe)
        with self.timed("save"):
            moe.save_pretrained(self.output / "moe")
        self.learn_alpha(moe)
        models[MERGED] = merge(moe)
        self.check_merged(moe, models[MERGED])
        with self.timed("save"):
            save_pretrained(models[MERGED], self.output / "merged")
        self.check_reload(models[MERGED], "merged")
        self.measure_arms(models)
        return self.result

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
        checks = config.checks
        self.check_at_least("relative distance between routed experts' weights", weight, checks.expert_weight_distance)
        self.check_at_least("relative distance between routed experts' outputs", output, checks.expert_disagreement)
