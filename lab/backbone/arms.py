"""The reward models of one regime and block of seeds: every arm made of its stages, each trained once and kept.

A finished stage is a file, atomic and with a digest, so that an interrupted study goes on from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ummrm import UpcycleConfig

from ..costs import BACKWARD
from ..files import kept
from .config import BackboneArm, BackboneStudy, Variation
from .data import Block, Features, Network
from .measures import Scores, combined, score, score_all
from .mixture import TokenMixture, learn_alpha, merged, train_token
from .optimiser import Optimisation
from .replicas import Parameters, member
from .training import distil, merged_by_mean, shortcut_weights, train_dense, train_sequence

OnStep = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@dataclass(frozen=True)
class RewardModel:
    """One model of each seed; called with features, it gives their rewards.

    Attributes:
        network: the forward.
        parameters: of each seed.
        shared_weight: of a shared expert.
        mixture: the configuration of a token mixture, if it is one.
    """

    network: Network
    parameters: Parameters
    shared_weight: float = 0.0
    mixture: UpcycleConfig | None = None

    def __call__(self, features: Features) -> Tensor:
        mixture = None if self.mixture is None else TokenMixture(self.network, self.mixture, self.parameters)
        return self.network.rewards(self.parameters, features, self.shared_weight, mixture)

    def of(self, seed: int) -> RewardModel:
        """That of one seed alone, by its place in the block."""
        return dataclasses.replace(self, parameters={n: value[seed : seed + 1] for n, value in self.parameters.items()})


@dataclass(frozen=True)
class RewardModels:
    """An arm of each seed of a block, ready for use.

    Attributes:
        members: its models by name; several where scores are combined.
        parameters: of each seed's only model, where it is a dense one.
        stages: floating-point operations of each stage of training that it needs, fp64 [S], by the stage's name.
        serving_flops: operations a token of one forward, fp64 [S].
        served: parameters that serving takes.
        rule: how several models' scores combine.
        uncertainty: UWO's weight.
    """

    members: dict[str, RewardModel]
    parameters: Parameters | None
    stages: dict[str, Tensor]
    serving_flops: Tensor
    served: int
    rule: str = "mean"
    uncertainty: float = 0.0

    @property
    def training_flops(self) -> Tensor:
        """Operations of all training after the regime's start, fp64 [S]."""
        return torch.stack(list(self.stages.values())).sum(0)


class BackboneArms:
    """Makes the arms of one regime and block.

    Args:
        study: the study.
        regime: name of the regime.
        block: its data.
        folder: where finished stages are kept; None keeps them in memory alone.
        on_step: told of training steps.
    """

    def __init__(
        self,
        study: BackboneStudy,
        regime: str,
        block: Block,
        folder: Path | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.study, self.regime, self.block, self.folder = study, regime, block, folder
        self.on_step = on_step or (lambda stage, done, total: None)
        self._stages: dict[str, dict] = {}
        self._scores: dict[str, Scores] = {}  # of members, which several ensembles combine
        self._teachers: dict[str, Tensor] = {}

    def make(self, name: str, variation: Variation) -> RewardModels:
        """An arm in a variation."""
        arm = self.study.arms[name]
        if arm.kind == "distilled":
            return self._distilled(name, arm, variation)
        if arm.kind == "weight_average":
            runs = [self._trained(arm.of, variation, run) for run in range(self.study.arms[arm.of].runs)]
            parts = [parameters for parameters, _ in runs]
            mean = {key: torch.stack([p[key].double() for p in parts]).mean(0).float() for key in parts[0]}
            return self._dense(f"{name}-{variation}", mean, {k: v for _, stages in runs for k, v in stages.items()})
        if arm.kind == "ensemble":
            return self._ensemble(arm, variation)
        base = self.study.base(name)
        parameters, stages = self._trained(base, variation)
        config = self.study.arms[base]
        if arm.kind == "mixture":
            return self._mixture(f"{name}-{variation}", config, parameters, stages)
        if arm.kind == "token":
            return self._merged_token(name, config, variation, parameters, stages)
        if arm.kind == "sequence":
            parameters = merged_by_mean(self.block, parameters, config.sequencing)
        return self._dense(f"{name}-{variation}", parameters, stages)

    def scores(self, models: RewardModels) -> Scores:
        """Scores of all answers that are measured."""
        return combined(self.member_scores(models), models.rule, models.uncertainty)

    def member_scores(self, models: RewardModels) -> list[Scores]:
        """The same of each model by itself."""
        found = []
        for label, one in models.members.items():
            if label not in self._scores:
                self._scores[label] = score_all(self.block, one)
            found.append(self._scores[label])
        return found

    # ---- arms --------------------------------------------------------------------------------------------------

    def _dense(self, label: str, parameters: Parameters, stages: dict[str, Tensor]) -> RewardModels:
        network = self.block.network
        return RewardModels(
            members={label: RewardModel(network, parameters)},
            parameters=parameters,
            stages=stages,
            serving_flops=network.forward_flops(self.block.length),
            served=network.parameter_count(parameters),
        )

    def _ensemble(self, arm: BackboneArm, variation: Variation) -> RewardModels:
        base, network = self.study.arms[arm.of], self.block.network
        sequencing = base.sequencing
        stages: dict[str, Tensor] = {}
        models: dict[str, Parameters] = {}
        share = 0.0
        if base.kind == "sequence":
            parameters, stages = self._trained(arm.of, variation)
            names, share = network.expert_names(sequencing.experts_in), sequencing.shared_weight
            models = {
                f"{arm.of}-{variation} member {e}": member(parameters, names, e) for e in range(sequencing.experts)
            }
            served = network.parameter_count(parameters)
        else:
            for run in range(base.runs):
                parameters, flops = self._trained(arm.of, variation, run)
                models[f"{arm.of}-{variation} run {run}"] = parameters
                stages |= flops
            served = sum(network.parameter_count(p) for p in models.values())
        return RewardModels(
            members={label: RewardModel(network, parameters, share) for label, parameters in models.items()},
            parameters=None,
            stages=stages,
            serving_flops=len(models) * self._sequence_flops(share),
            served=served,
            rule=arm.rule,
            uncertainty=arm.uncertainty,
        )

    def _mixture(self, label: str, arm: BackboneArm, parameters: Parameters, stages: dict[str, Tensor]) -> RewardModels:
        network, config = self.block.network, arm.upcycle_config
        return RewardModels(
            members={label: RewardModel(network, parameters, mixture=config)},
            parameters=None,
            stages=stages,
            serving_flops=network.forward_flops(self.block.length, config.num_experts_per_tok),
            served=network.parameter_count(parameters),
        )

    def _merged_token(
        self, name: str, arm: BackboneArm, variation: Variation, parameters: Parameters, stages: dict[str, Tensor]
    ) -> RewardModels:
        config = arm.upcycle_config

        def make() -> dict:
            return {
                "alpha": learn_alpha(
                    self.block,
                    parameters,
                    arm.alpha_steps,
                    self.study.batch,
                    arm.alpha_rate,
                    dataclasses.replace(self._settings(arm), warmup_steps=0, weight_decay=0.0),
                    config.num_experts,
                    arm.shared_share,
                    self._said("merge weights"),
                )
            }

        label = f"{name}-{variation}-alpha"
        alpha = self._stage(label, name, make)["alpha"]
        flops = self._training_flops(arm.alpha_steps)
        return self._dense(label, merged(self.block, parameters, alpha, arm.shared_share), {**stages, label: flops})

    def _distilled(self, name: str, arm: BackboneArm, variation: Variation) -> RewardModels:
        block, study = self.block, self.study
        inner = dataclasses.replace(variation, student_rate=0.0)
        teacher = self.make(arm.of, inner)
        student = self.make(arm.student, inner) if arm.student else self._dense("start", block.start, {})
        assert student.parameters is not None  # the study's check has seen to it
        answers = block.without_labels(arm.texts, arm.answers)
        length = answers.lengths.double().mean(1)
        scoring = teacher.serving_flops * length * len(answers)
        forward = block.network.forward_flops(length)
        flops = scoring + (1 + BACKWARD) * forward * arm.steps[0] * study.student_batch * length
        start = student.parameters

        def make() -> dict:
            afresh = not arm.student and study.regimes[self.regime].trained is None
            own = None if afresh else score(block, answers, next(iter(student.members.values())))
            targets = in_scale_of(self._teaching(teacher, arm), own)
            settings, said = self._settings(arm), self._said("distillation")
            rate, batch = variation.student_rate, study.student_batch
            return {"parameters": distil(block, answers, start, targets, arm.steps[0], batch, rate, settings, said)}

        label = f"{name}-{variation}"
        taught = self._stage(label, name, make)["parameters"]
        return self._dense(label, taught, {**teacher.stages, **student.stages, label: flops})

    def _teaching(self, teacher: RewardModels, arm: BackboneArm) -> Tensor:
        """The teacher's scores of the answers that `arm` distils on, normalised: fp64 [S, n]."""
        sets = []
        for name, one in teacher.members.items():
            label = f"{name} on {arm.answers} {arm.texts}"
            if label not in self._teachers:
                self._teachers[label] = score(self.block, self.block.without_labels(arm.texts, arm.answers), one)
            found = self._teachers[label]
            sets.append(Scores({"unlabelled": found, "reference": found}))
        return combined(sets, teacher.rule, teacher.uncertainty).sets["unlabelled"]

    # ---- stages ------------------------------------------------------------------------------------------------

    def _trained(self, name: str, variation: Variation, run: int = 0) -> tuple[Parameters, dict[str, Tensor]]:
        """The parameters of an arm that is trained on pairs, and the operations that took."""
        arm, block, study = self.study.arms[name], self.block, self.study
        label = f"{name}-{variation.steps}-{variation.rate:g}-{run}"
        said, settings = self._said(name), self._settings(arm)
        extra, steps = 0.0, variation.steps
        if arm.kind == "token":
            steps -= arm.alpha_steps
            extra = float(arm.upcycle_config.num_experts_per_tok)
        elif arm.sequencing.shared_weight and arm.kind == "sequence":
            extra = 1.0

        def make() -> dict:
            pairs = block.with_counterfactual() if arm.pairs == "counterfactual" else block.train
            weights = shortcut_weights(pairs) if arm.pairs == "weighted" else None
            common = (block, steps, study.batch, variation.rate, settings)
            if arm.kind == "token":
                return {"parameters": train_token(*common, arm.upcycle_config, said)}
            if arm.kind == "sequence":
                return {"parameters": train_sequence(*common, arm.sequencing, pairs, weights, said)}
            return {"parameters": train_dense(*common, run, pairs, weights, said, arm.own_heads)}

        times = arm.sequencing.experts if arm.kind == "sequence" and arm.sequencing.whole_batch else 1
        flops = times * self._training_flops(steps, extra)
        return self._stage(label, name, make)["parameters"], {label: flops}

    def _stage(self, label: str, arm: str, make: Callable[[], dict]) -> dict:
        if label not in self._stages:
            made_as = self.study.fingerprint(self.regime, arm)
            path = None if self.folder is None else self.folder / f"{label}-{made_as}.pt"
            if path is not None:
                self._stages = {}  # one at a time in memory: a study has hundreds
            self._stages[label] = make() if path is None else kept(path, make)
        return self._stages[label]

    def _settings(self, arm: BackboneArm) -> Optimisation:
        return (
            self.study.optimisation
            if arm.clip
            else dataclasses.replace(self.study.optimisation, max_grad_norm=math.inf)
        )

    def _said(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_step(stage, done, total)

    def _sequence_flops(self, shared_weight: float) -> Tensor:
        return self.block.network.forward_flops(self.block.length, float(shared_weight > 0))

    def _training_flops(self, steps: int, extra_ffns: float = 0.0) -> Tensor:
        tokens = steps * 2 * self.study.batch * self.block.length
        return (1 + BACKWARD) * self.block.network.forward_flops(self.block.length, extra_ffns) * tokens


def in_scale_of(targets: Tensor, own: Tensor | None) -> Tensor:
    """Targets [S, n] shifted and scaled to the mean and spread that a student's own scores [S, n] have.

    So that a student that starts as a trained model need learn neither; one that starts afresh (None) learns targets of
    mean 0 and spread 1.
    """
    normal = (targets - targets.mean(1, keepdim=True)) / targets.std(1, keepdim=True)
    return normal if own is None else own.mean(1, keepdim=True) + own.std(1, keepdim=True) * normal
