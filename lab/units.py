"""One unit of a study: a regime, a seed, an arm and an optimiser, measured from the reward model to plain numbers.

Knows nothing of files and processes (`run.py`) nor of comparisons (`compare.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .arms import Arms, RewardModel
from .best_of_n import best_of_n, standardised
from .config import MeasureConfig, StudyConfig
from .demo.measure import forward_latency
from .fits import drop_from_peak, fit_best_of_n, fit_rl, smoothed, value_at_kl
from .online import OnlineRecord, run_online
from .policy import PolicyModel
from .ppo import PPORecord, run_ppo
from .tasks import PolicySamples, PreferencePairs

# Columns of runs.csv after regime, seed, arm and optimiser. Rewards are in standard deviations of the policy's own
# answers from their mean, so that seeds, whose gold rewards differ, can be compared.
VALUES = (
    "gold_at_kl",
    "gold_end",
    "gold_peak",
    "kl_peak",
    "kl_end",
    "drop_from_peak",
    "proxy_end",
    "proxy_gold_gap",
    "shortcut_end",
    "fit_a",
    "fit_b",
    "fit_r2",
    "accuracy",
    "accuracy_shifted",
    "accuracy_policy",
    "accuracy_tail",
    "parameters",
    "training_flops",
    "serving_flops",
)


@dataclass(frozen=True)
class Unit:
    """What is run and kept as one."""

    regime: str
    seed: int
    arm: str
    optimiser: str

    def __str__(self) -> str:
        return f"{self.regime}-{self.seed}-{self.arm}-{self.optimiser}"


def units_of(study: StudyConfig, regime: str, seed: int, arms: tuple[str, ...], optimisers: tuple[str, ...]):
    """The units of one regime and seed, in the order in which they are run."""
    return [
        Unit(regime, seed, arm, optimiser)
        for arm in arms
        for optimiser in study.optimisers(arm)
        if optimiser in optimisers
    ]


class UnitRunner:
    """Measures the units of one regime and seed, whose arms and policy it makes when they are first asked for."""

    def __init__(self, arms: Arms) -> None:
        self.arms, self.study, self.task = arms, arms.study, arms.task
        self._models: dict[str, RewardModel] = {}
        self._policy: PolicyModel | None = None

    def measure(self, unit: Unit) -> dict:
        """Runs a unit.

        Returns:
            Plain data: `values` (of `VALUES`, those that apply), `curve` (rows of rewards against KL), `experts` (rows
            about experts and merge weights) and `timings`, which alone differ from run to run.
        """
        start = time.perf_counter()
        run = {"best_of_n": self._best_of_n, "ppo": self._ppo}.get(unit.optimiser, self._online)
        with self.arms.setting.computing():
            found = run(unit, self.model(unit.arm))
        found["timings"]["seconds"] = time.perf_counter() - start
        return found

    def model(self, arm: str) -> RewardModel:
        """The arm's reward model."""
        if arm not in self._models:
            self._models[arm] = self.arms.make(arm)
        return self._models[arm]

    def policy(self) -> PolicyModel:
        """The policy that PPO, RLOO and GRPO start from; the same for every arm."""
        if self._policy is None:
            self._policy = self.arms.setting.policy(self.arms.derive("policy"))
        return self._policy

    def _best_of_n(self, unit: Unit, model: RewardModel) -> dict:
        samples = self.task.policy
        proxy = model(samples.sequences).view_as(samples.gold)
        result = best_of_n(standardised(proxy), standardised(samples.gold), samples.shortcut)
        curve = [
            {"step": n, "kl": kl, "proxy": p, "gold": g, "shortcut": s}
            for n, kl, p, g, s in zip(result.n, result.kl, result.proxy, result.gold, result.shortcut, strict=True)
        ]
        fit = fit_best_of_n([math.sqrt(kl) for kl in result.kl], [g - result.gold[0] for g in result.gold])
        values = {
            **curve_values(curve, self.study.measure.fixed_kl, 1),
            **dict(zip(("fit_a", "fit_b", "fit_r2"), fit, strict=True)),
            "accuracy": self._accuracy(model, self.task.test),
            "accuracy_shifted": self._accuracy(model, self.task.shifted),
            **policy_accuracies(proxy, samples, self._most_trained()),
            "parameters": model.parameters,
            "training_flops": model.training_flops,
            "serving_flops": model.serving_flops,
        }
        dense = self.model(next(name for name, arm in self.study.arms.items() if arm.kind == "dense"))
        inputs = self.task.test.chosen.select(slice(0, self.study.measure.latency_batch)).inputs(self.study.device)
        latency = forward_latency(
            {"dense": _forward(dense), "arm": _forward(model)}, inputs, self.study.measure.latency_rounds
        )
        timings = {f"{n}forward_ms": latency[k].milliseconds for n, k in (("", "arm"), ("dense_", "dense"))}
        return {"values": values, "curve": curve, "experts": expert_rows(model.record), "timings": timings}

    def _ppo(self, unit: Unit, model: RewardModel) -> dict:
        samples = self.task.policy
        mean, std = samples.gold.mean().item(), samples.gold.std().item()
        records = run_ppo(
            self.policy(),
            self.task.prompts,
            model,
            self.task.gold,
            self.study.ppo,
            self.arms.derive("ppo"),
            measures={"shortcut": self.task.shortcut_of} if self.task.shortcut_of is not None else None,
            on_step=lambda record: self.arms.on_step(f"PPO on {unit.arm}", record.step, self.study.ppo.steps),
        )
        return self._path([path_row(record, mean, std) for record in records])

    def _online(self, unit: Unit, model: RewardModel) -> dict:
        samples, config = self.task.policy, getattr(self.study, unit.optimiser)
        mean, std = samples.gold.mean().item(), samples.gold.std().item()
        proxy = model(samples.sequences)
        shift, scale = proxy.mean(), proxy.std()
        setting = self.arms.setting
        records = run_online(
            unit.optimiser,
            self.policy(),
            self.task.prompts,
            setting.prompt_texts(),
            lambda sequences: (model(sequences) - shift) / scale,
            self.task.gold,
            config,
            self.arms.derive(unit.optimiser),
            setting.prompt_template,
            setting.computing,
            measures={"shortcut": self.task.shortcut_of},
            on_step=lambda record: self.arms.on_step(
                f"{unit.optimiser.upper()} on {unit.arm}", record.step, config.steps
            ),
        )
        return self._path([path_row(record, mean, std) for record in records])

    def _path(self, curve: list[dict]) -> dict:
        return {"values": path_values(curve, self.study.measure), "curve": curve, "experts": [], "timings": {}}

    def _accuracy(self, model: RewardModel, pairs: PreferencePairs) -> float:
        if len(pairs) == 0:
            return math.nan  # pairs of checkpoints may all be of one kind
        return share_right(model(pairs.chosen), model(pairs.rejected))

    def _most_trained(self) -> float:
        """The largest amount of the shortcut in any training answer."""
        train = self.task.train
        return max(self.task.shortcut_of(answers).max().item() for answers in (train.chosen, train.rejected))


def share_right(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Share of pairs whose chosen answer scores higher; a tie counts half. NaN without pairs."""
    if len(chosen) == 0:
        return math.nan
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def policy_accuracies(proxy: torch.Tensor, samples: PolicySamples, most_trained: float) -> dict[str, float]:
    """Preference accuracy over pairs of the policy's own answers to one prompt, against gold.

    Args:
        proxy: [prompts, samples].
        samples: gold reward and amount of shortcut of the same answers.
        most_trained: the largest amount of the shortcut that training showed.

    Returns:
        `accuracy_policy` over all pairs, `accuracy_tail` over those in which an answer goes beyond `most_trained`.
    """
    half = proxy.shape[1] // 2
    first, second = (slice(0, half), slice(half, 2 * half))
    gold, score, shortcut = (
        torch.stack([v[:, first].flatten(), v[:, second].flatten()]) for v in (samples.gold, proxy, samples.shortcut)
    )
    decided = gold[0] != gold[1]
    tail = decided & (shortcut.amax(0) > most_trained)
    sign = (gold[0] - gold[1]).sign()
    lead = (score[0] - score[1]) * sign
    zero = torch.zeros_like(lead)
    return {
        "accuracy_policy": share_right(lead[decided], zero[decided]),
        "accuracy_tail": share_right(lead[tail], zero[tail]),
    }


def curve_values(curve: list[dict], fixed_kl: float, window: int) -> dict[str, float]:
    """What is read off a curve of rewards against KL; `window` points are averaged first.

    Rewards are in standard deviations of the policy's own answers; `gold_at_kl` is NaN where the curve never gets
    there.
    """
    kl = smoothed([row["kl"] for row in curve], window)
    gold, proxy = (smoothed([row[name] for row in curve], window) for name in ("gold", "proxy"))
    raw_gold = [row["gold"] for row in curve]
    peak = max(range(len(gold)), key=gold.__getitem__)
    return {
        "gold_at_kl": value_at_kl([row["kl"] for row in curve], raw_gold, fixed_kl, window),
        "gold_end": gold[-1],
        "gold_peak": gold[peak],
        "kl_peak": kl[peak],
        "kl_end": kl[-1],
        "drop_from_peak": drop_from_peak(raw_gold, window),
        "proxy_end": proxy[-1],
        "proxy_gold_gap": proxy[-1] - gold[-1],
        "shortcut_end": smoothed([row["shortcut"] for row in curve], window)[-1],
    }


def path_values(curve: list[dict], measure: MeasureConfig) -> dict[str, float]:
    """What is read off a trained policy's path, from its `path_row`s: `curve_values` and the fit."""
    fit = fit_rl([math.sqrt(max(row["kl"], 0)) for row in curve], [row["gold"] - curve[0]["gold"] for row in curve])
    values = curve_values(curve, measure.ppo_fixed_kl, measure.ppo_window)
    return values | dict(zip(("fit_a", "fit_b", "fit_r2"), fit, strict=True))


def expert_rows(record: dict) -> list[dict]:
    """Rows about experts from what an arm's training recorded: specialisation, merge weights."""
    rows = [dict(row) for row in record.get("specialisation", [])]
    for i, coefficients in enumerate(record.get("coefficients", {}).values()):
        one_alpha = all(row == coefficients[0] for row in coefficients)
        for projection, row in enumerate(coefficients[:1] if one_alpha else coefficients):
            for expert, value in enumerate(row):
                rows.append(
                    {
                        "step": "",
                        "layer": f"layer {i}",
                        "measure": f"merge_weight_{projection}",
                        "expert": expert,
                        "regime": "",
                        "value": value,
                    }
                )
    return rows


def _forward(model: RewardModel) -> Callable[..., None]:
    def forward(**inputs) -> None:
        for one in model.models:
            one(**inputs)

    return forward


def path_row(record: PPORecord | OnlineRecord, mean: float, std: float) -> dict:
    """A point of a trained policy's path as curves.csv has it; `mean` and `std` are of the policy's own gold reward."""
    return {
        "step": record.step,
        "kl": record.kl,
        "proxy": record.reward,
        "gold": (record.gold - mean) / std,
        "shortcut": record.measures.get("shortcut", math.nan),
        "kl_estimate": record.kl_estimate,
        "entropy": record.entropy,
        "length": record.length,
        "clip_fraction": getattr(record, "clip_fraction", None),
        "value_loss": getattr(record, "value_loss", None),
    }
