"""The reward models of one regime and seed: every arm of a study, trained once and kept.

All training, upcycling and merging is the product's own (`lab.demo`, `ummrm.upcycle`, `ummrm.merge`); this module
says which stages an arm is made of and what they cost. A finished stage is kept in a folder, atomically, so that an
interrupted study goes on from it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ummrm import auxiliary_loss, combine_scores, merge, merge_coefficients, upcycle

from .config import ResolvedArm, StudyConfig
from .costs import forward_flops, merging_flops, training_flops
from .demo.config import TrainConfig
from .demo.measure import parameter_count, rewards_of
from .demo.stages import start_merge
from .demo.training import train
from .files import kept
from .seeds import derive
from .setting import make_setting
from .specialisation import expert_distances, measure_specialisation
from .tasks import Sequences, concatenate

OnStep = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@dataclass
class Stage:
    """A trained model, and what its training left.

    Attributes:
        model: in eval mode.
        flops: of its training, from random weights on: all stages before it counted in.
        record: what was measured on the way, plain data.
    """

    model: PreTrainedModel
    flops: float
    record: dict = field(default_factory=dict)


@dataclass
class RewardModel:
    """An arm ready for use: one model, or several whose normalised scores are combined.

    Attributes:
        models: its models, in eval mode.
        training_flops: floating-point operations of all its training.
        serving_flops: floating-point operations a token of one forward.
        batch_size: sequences a forward.
        rule: how several models' scores combine.
        uncertainty: UWO's weight of the variance.
        scales: mean and standard deviation of each member's scores over the reference answers.
        record: what was measured while it was trained.
        scorer: scores of one of the models, `demo.measure.rewards_of` or what gives the same.
    """

    models: list[PreTrainedModel]
    training_flops: float
    serving_flops: float
    batch_size: int
    rule: str = "mean"
    uncertainty: float = 0.0
    scales: list[tuple[float, float]] = field(default_factory=list)
    record: dict = field(default_factory=dict)
    scorer: Callable[[PreTrainedModel, Sequences, int], torch.Tensor] = rewards_of

    def __call__(self, sequences: Sequences) -> torch.Tensor:
        """Rewards, fp64 [N]."""
        scores = [self.scorer(model, sequences, self.batch_size) for model in self.models]
        if len(scores) == 1:
            return scores[0]
        return combine_scores(torch.stack(scores, 1), self.rule, uncertainty=self.uncertainty, scales=self.scales)

    @property
    def parameters(self) -> int:
        """Parameters that serving it takes."""
        return sum(parameter_count(model) for model in self.models)


def average_weights(models: list[PreTrainedModel]) -> PreTrainedModel:
    """A model whose parameters are the means of `models`' (WARM, arXiv 2401.12187); buffers of the first."""
    averaged = copy.deepcopy(models[0])
    others = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, parameter in averaged.named_parameters():
            parameter.copy_(torch.stack([other[name].double() for other in others]).mean(0))
    return averaged


class Arms:
    """Makes the arms of one regime and seed, sharing every stage that they have in common.

    Args:
        study: the study.
        regime: name of the regime.
        seed: of data, initialisation, data order and everything else that is drawn.
        folder: where finished stages are kept; None keeps them in memory alone.
        on_step: told of training steps.
    """

    def __init__(
        self, study: StudyConfig, regime: str, seed: int, folder: Path | None = None, on_step: OnStep | None = None
    ) -> None:
        self.study, self.regime, self.seed, self.folder = study, regime, seed, folder
        self.on_step = on_step or (lambda stage, done, total: None)
        self.setting = make_setting(study, regime, self.derive, folder, self.on_step)
        self.task = self.setting.task
        train_pairs = self.task.train
        self.mean_length = torch.cat([train_pairs.chosen.lengths, train_pairs.rejected.lengths]).double().mean().item()
        reference = train_pairs.select(slice(0, study.measure.reference_pairs))
        self.reference = concatenate([reference.chosen, reference.rejected])
        self._stages: dict[str, Stage] = {}
        self._member_scores: dict[tuple[int, int], torch.Tensor] = {}

    def derive(self, *labels: object) -> int:
        """The seed of what `labels` name, in this regime and seed."""
        return derive(self.seed, self.regime, *labels)

    def make(self, name: str) -> RewardModel:
        """The arm of that name."""
        study, arm, stages = self.study, self.study.arms[name], self.study.resolve(name)
        if arm.kind == "dense":
            return self._single(self.dense(stages))
        if arm.kind == "dense_longer":
            return self._single(self.longer(stages, self.equal_steps(stages, arm.budget)))
        if arm.kind == "moe":
            return self._single(self.moe(stages))
        if arm.kind == "merged":
            return self._single(self.merged(stages, arm.alpha == "learned"))
        if arm.kind == "weight_average":
            steps = self.equal_steps(stages, "steps")
            members = [self.longer(stages, steps, member) for member in range(study.members)]
            start = self.dense(stages).flops  # all members share it
            flops = start + sum(m.flops - start for m in members)
            return self._single(Stage(average_weights([m.model for m in members]), flops))
        members = [self.dense(stages, member) for member in range(study.members)]
        scores = [self._score_once(m.model, self.reference, study.measure.batch_size) for m in members]
        return RewardModel(
            models=[m.model for m in members],
            training_flops=sum(m.flops for m in members),
            serving_flops=sum(forward_flops(m.model, self.mean_length) for m in members),
            batch_size=study.measure.batch_size,
            rule=arm.rule,
            uncertainty=arm.uncertainty,
            scales=[(s.mean().item(), s.std().item()) for s in scores],
            scorer=self._score_once,
        )

    def _score_once(self, model: PreTrainedModel, sequences: Sequences, batch_size: int) -> torch.Tensor:
        """`rewards_of`, kept for sequences that last as long as the task: three ensembles combine the same members."""
        task = self.task
        lasting = (
            self.reference,
            task.policy.sequences,
            *(s for p in (task.test, task.shifted) for s in (p.chosen, p.rejected)),
        )
        if not any(sequences is one for one in lasting):
            return rewards_of(model, sequences, batch_size)
        key = (id(model), id(sequences))
        if key not in self._member_scores:
            self._member_scores[key] = rewards_of(model, sequences, batch_size)
        return self._member_scores[key]

    def _single(self, stage: Stage) -> RewardModel:
        flops = forward_flops(stage.model, self.mean_length)
        return RewardModel([stage.model], stage.flops, flops, self.study.measure.batch_size, record=stage.record)

    # ---- stages ----------------------------------------------------------------------------------------------

    def dense(self, stages: ResolvedArm, member: int = 0) -> Stage:
        """A dense reward model; members differ in initialisation and data order."""

        def make(model: PreTrainedModel) -> dict:
            self._train(model, stages.dense, f"dense {member}", self.derive("dense order", member))
            return {}

        return self._stage(
            f"dense-{member}",
            {"dense": stages.dense},
            lambda: self.setting.dense(self.derive("dense", member)),
            make,
            lambda model: self._training_flops(model, stages.dense),
        )

    def longer(self, stages: ResolvedArm, training: TrainConfig, member: int = 0) -> Stage:
        """Continued training of the dense model; member 0 sees the mixture's batches, another its own data order."""

        def make(model: PreTrainedModel) -> dict:
            self._train(model, training, f"dense on {member}", self._order(member))
            return {}

        return self._stage(
            f"longer-{member}",
            {"dense": stages.dense, "training": training},
            lambda: copy.deepcopy(self.dense(stages).model),
            make,
            lambda model: self.dense(stages).flops + self._training_flops(model, training),
        )

    def moe(self, stages: ResolvedArm) -> Stage:
        """The dense model upcycled and trained; its experts are measured on the way."""
        points = self.study.measure.specialisation_points

        def build() -> PreTrainedModel:
            dense = self.dense(stages).model  # first: making or loading it draws random numbers
            torch.manual_seed(self.derive("upcycle"))
            return upcycle(dense, stages.upcycle, copy=True)

        def make(model: PreTrainedModel) -> dict:
            training = dataclasses.replace(stages.moe, evaluations=points)
            rows: list[dict] = []
            stops = iter(round(training.steps * (i + 1) / points) for i in range(points))

            def look(moe: PreTrainedModel) -> dict[str, float]:
                found = measure_specialisation(
                    moe,
                    self.task,
                    self.study.measure.specialisation_pairs,
                    self.study.measure.batch_size,
                    self.derive("specialisation"),
                )
                step = next(stops)
                rows.extend({"step": step, **row} for row in found)
                return {}

            self._train(model, training, "mixture", self._order(0), auxiliary=auxiliary_loss, evaluate=look)
            return {"specialisation": rows}

        return self._stage(
            "moe",
            {"dense": stages.dense, "upcycle": stages.upcycle, "moe": stages.moe},
            build,
            make,
            lambda model: self.dense(stages).flops + self._training_flops(model, stages.moe),
        )

    def merged(self, stages: ResolvedArm, learned: bool) -> Stage:
        """The mixture folded back into a dense model, with learned or uniform merge weights."""
        steps = stages.alpha.steps if learned else 0

        def build() -> PreTrainedModel:
            self.moe(stages)
            return copy.deepcopy(self.dense(stages).model)

        def make(model: PreTrainedModel) -> dict:
            moe = copy.deepcopy(self.moe(stages).model)
            pairs = self.task.train.select(slice(0, self.study.measure.reference_pairs))
            start_merge(moe, stages.merge, pairs.chosen, self.study.measure.batch_size)
            extra = merging_flops(moe, steps)
            if learned:
                self._train(moe, stages.alpha, "merge weights", self.derive("alpha order"))
            coefficients = {name: c.tolist() for name, c in merge_coefficients(moe).items()}
            model.load_state_dict(merge(moe).state_dict())
            return {"coefficients": coefficients, "merging_flops": extra, **self._mixture(stages)}

        stage = self._stage(
            "merged-learned" if learned else "merged-uniform",
            {
                "dense": stages.dense,
                "upcycle": stages.upcycle,
                "moe": stages.moe,
                "merge": stages.merge,
                **({"alpha": stages.alpha} if learned else {}),
            },
            build,
            make,
            lambda model: 0.0,
        )
        learning = self._training_flops(stage.model, stages.alpha) if learned else 0.0
        flops = self.moe(stages).flops + learning + stage.record["merging_flops"]
        return dataclasses.replace(stage, flops=flops)

    def _mixture(self, stages: ResolvedArm) -> dict:
        """What a merged model reports on the mixture that it comes from."""
        if not self.study.measure.mixtures:
            return {}
        mixture = self.moe(stages)
        rows = [row for row in mixture.record["specialisation"] if row["measure"] != "ablation_cost"]
        last = max(row["step"] for row in rows)
        start = upcycle(self.dense(stages).model, dataclasses.replace(stages.upcycle, expert_noise=0.0), copy=True)
        distances = [{"step": last, **row} for row in expert_distances(mixture.model, start)]
        return {"specialisation": [*(row for row in rows if row["step"] == last), *distances]}

    def equal_steps(self, stages: ResolvedArm, budget: str) -> TrainConfig:
        """Continued training of the dense model, as long or as costly as mixture and merge weights are."""
        if budget == "steps":
            return dataclasses.replace(stages.moe, steps=stages.moe.steps + stages.alpha.steps)
        extra = self.merged(stages, learned=True).flops - self.dense(stages).flops
        one = self._training_flops(self.dense(stages).model, dataclasses.replace(stages.moe, steps=1))
        return dataclasses.replace(stages.moe, steps=max(round(extra / one), 1))

    # ---- helpers ---------------------------------------------------------------------------------------------

    def _order(self, member: int) -> int:
        return self.derive("order", member)

    def _training_flops(self, model: PreTrainedModel, training: TrainConfig) -> float:
        tokens = 2 * training.batch_size * self.mean_length * training.steps
        return training_flops(model, tokens, self.mean_length)

    def _train(self, model: PreTrainedModel, training: TrainConfig, label: str, seed: int, **options) -> None:
        train(
            model,
            self.task.train,
            training,
            seed,
            on_step=lambda step, loss: self.on_step(label, step, training.steps),
            **options,
        )

    def _stage(
        self,
        name: str,
        configs: dict,
        build: Callable[[], PreTrainedModel],
        make: Callable[[PreTrainedModel], dict],
        flops: Callable[[PreTrainedModel], float],
    ) -> Stage:
        """A stage from memory, from its file, or made: `build` gives a model, `make` trains it and returns a record."""
        study = self.study
        given = {"task": study.regimes[self.regime].task, "model": study.model, "measure": study.measure, **configs}
        plain = {key: dataclasses.asdict(value) for key, value in given.items()}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=list).encode()).hexdigest()[:12]
        key = f"{name}-{digest}"
        if key in self._stages:
            return self._stages[key]
        model = build()

        def trained() -> dict:
            record = json.dumps(make(model))
            return {"state": model.state_dict(), "record": record}

        found = trained() if self.folder is None else kept(self.folder / f"{key}.pt", trained, study.device)
        model.load_state_dict(found["state"])
        self._stages[key] = Stage(model.eval(), flops(model), json.loads(found["record"]))
        return self._stages[key]
