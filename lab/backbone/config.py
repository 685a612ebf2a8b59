"""The configuration of a study from a pretrained backbone: frozen dataclasses, checked when they are built.

`lab.config` configures the studies that train one model at a time; comparisons are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from ummrm import UpcycleConfig

from ..config import ComparisonConfig, MeasureConfig
from ..ratings.task import RatingsTaskConfig
from ..reading import build, require
from ..tasks.language import LanguageTaskConfig
from .llama import LlamaShape
from .mixture import check_token_config
from .optimiser import Optimisation
from .ppo_config import PolicyTraining
from .regimes import PretrainingConfig
from .training import Sequencing

KINDS = ("dense", "token", "mixture", "sequence", "ensemble", "weight_average", "distilled")
TRAINED = ("dense", "token", "sequence")  # those that are trained on pairs; others are made of them
OPTIMISERS = ("best_of_n", "ppo")
PAIRS = ("all", "weighted", "counterfactual")


@dataclass(frozen=True)
class TrainedStart:
    """Dense training on the regime's pairs that comes before every arm, which then starts from a trained reward model.

    Attributes:
        steps: how many.
        rate: its learning rate.
    """

    steps: int
    rate: float

    def __post_init__(self) -> None:
        require(self, "steps", self.steps >= 1, "at least 1")
        require(self, "rate", self.rate > 0, "above 0")


@dataclass(frozen=True)
class BackboneRegime:
    """A regime.

    Attributes:
        task: its data, `kind: language` or `kind: ratings`.
        title: in words.
        without: arms that are left out of it.
        trained: what every arm starts from; None: the pretrained backbone with a fresh head.
    """

    task: Annotated[LanguageTaskConfig | RatingsTaskConfig, Field(discriminator="kind")]
    title: str = ""
    without: tuple[str, ...] = ()
    trained: TrainedStart | None = None


@dataclass(frozen=True)
class BackboneArm:
    """A reward model that a study compares.

    Attributes:
        kind: `dense`; `token`: the token mixture, merged; `mixture`: that mixture itself; `sequence`: experts by
            sequence, merged by their mean; `ensemble`: of the runs of a dense arm or the members of a sequence arm;
            `weight_average`: of a dense arm's runs (WARM); `distilled`: a student of another arm's scores.
        label: in tables.
        of: the arm that a mixture, ensemble, weight average or teacher is.
        student: the arm whose model a distilled one starts from; empty: the regime's start.
        rates: learning rates to try; of a distilled arm the student's.
        steps: numbers of steps to try; of a distilled arm one, the student's.
        of_rates: which rates of the arm `of` are tried; empty: all.
        of_steps: which steps of it.
        pairs: `all`; `weighted` so that the shortcut says nothing (`training.shortcut_weights`); `counterfactual`: and
            besides them the same pairs with the shortcut exchanged.
        runs: runs of a dense arm that ensembles and weight averages take.
        own_heads: whether each of those starts from a fresh head of its own; a weight average needs a common one.
        sequencing: of `sequence`.
        upcycle: of `token`; fields of `ummrm.UpcycleConfig`.
        shared_share: lambda of `token`.
        alpha_steps: of `token`: steps, of those that it has, that learn the merge weights.
        alpha_rate: of `token`: their learning rate.
        clip: whether gradients are clipped.
        texts: of `distilled`: on which answers, the `policy`'s or those of the training `pairs`.
        answers: of `distilled`: on only so many of them; 0: all.
        rule: how an ensemble's scores combine: `mean`, `worst` or `uwo`.
        uncertainty: UWO's weight of the variance.
        most_seeds: it is run on the study's first so many seeds, a multiple of the block; 0: all.
        chosen_by: outcomes by which its variation is chosen (`choice.py`).
    """

    kind: str
    label: str = ""
    of: str = ""
    student: str = ""
    rates: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    of_rates: tuple[float, ...] = ()
    of_steps: tuple[int, ...] = ()
    pairs: str = "all"
    runs: int = 4
    own_heads: bool = False
    sequencing: Sequencing = Sequencing()
    upcycle: dict[str, Any] = field(default_factory=dict)
    shared_share: float = 0.5
    alpha_steps: int = 40
    alpha_rate: float = 5e-2
    clip: bool = True
    texts: str = "policy"
    answers: int = 0
    rule: str = "mean"
    uncertainty: float = 0.5
    most_seeds: int = 0
    chosen_by: tuple[str, ...] = ("accuracy_policy", "gold_at_kl")

    def __post_init__(self) -> None:
        require(self, "kind", self.kind in KINDS, "one of " + ", ".join(KINDS))
        require(self, "pairs", self.pairs in PAIRS, "one of " + ", ".join(PAIRS))
        require(self, "rule", self.rule in ("mean", "worst", "uwo"), "one of mean, worst, uwo")
        require(self, "texts", self.texts in ("policy", "pairs"), "one of policy, pairs")
        require(self, "answers", self.answers >= 0, "at least 0")
        require(self, "runs", self.runs >= 2, "at least 2")
        known = {"accuracy_policy", "gold_at_kl"}
        require(
            self, "chosen_by", len(self.chosen_by) > 0 and set(self.chosen_by) <= known, "accuracy_policy, gold_at_kl"
        )
        if self.kind in TRAINED:
            require(self, "of", self.of == "", f"empty for an arm of kind {self.kind}")
        else:
            require(self, "of", self.of != "", f"the name of an arm for one of kind {self.kind}")
        if self.kind in (*TRAINED, "distilled"):
            require(self, "rates", len(self.rates) > 0 and min(self.rates) > 0, "learning rates above 0")
            least = 0 if self.kind == "dense" else 1  # no step at all: the start itself
            expected = f"numbers of steps, at least {least}"
            require(self, "steps", len(self.steps) > 0 and min(self.steps) >= least, expected)
        if self.kind == "distilled":
            require(self, "steps", len(self.steps) == 1, "one number for a distilled arm")
        if self.kind == "token":
            check_token_config(self.upcycle_config)
            require(self, "alpha_steps", 0 <= self.alpha_steps < min(self.steps), "less than all steps")

    @property
    def upcycle_config(self) -> UpcycleConfig:
        """`upcycle` as the product reads it."""
        return UpcycleConfig.from_dict(self.upcycle)


@dataclass(frozen=True, order=True)
class Variation:
    """What is tuned of an arm.

    Attributes:
        steps: of the training on pairs.
        rate: its learning rate.
        student_rate: of a distilled arm.
    """

    steps: int
    rate: float
    student_rate: float = 0.0

    def __str__(self) -> str:
        name = f"s{self.steps}_r{round(self.rate * 1e5)}"
        return name + (f"_d{round(self.student_rate * 1e5)}" if self.student_rate else "")

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.steps} steps, rate {self.rate:g}" + (
            f", student's {self.student_rate:g}" * bool(self.student_rate)
        )


@dataclass(frozen=True)
class BackboneStudy:
    """A study: every arm in every regime over blocks of seeds that are trained side by side.

    Attributes:
        name: for titles.
        regimes: by name.
        arms: by name, in the order of tables.
        seeds: number of seeds.
        first_seed: the first one.
        block: seeds that are trained side by side; a unit is one arm over one block.
        processes: worker processes of one thread each, over blocks and regimes.
        batch: pairs a step.
        student_batch: answers a step of distillation.
        model: size of the models of `kind: language`.
        pretraining: of their backbones.
        optimisation: of everything else.
        chosen: the variation of each arm in each regime that has several; in YAML the name of a file beside the
            study's, written by `choice.py`. Empty: every variation is run.
        ppo: PPO, where it is run.
        measure: `fixed_kl` counts here, and with PPO `ppo_fixed_kl` and `ppo_window`.
        primaries: the primary comparisons, made in every regime.
        secondary: further ones.
        kind: tells kinds of studies apart.
    """

    name: str
    regimes: dict[str, BackboneRegime]
    arms: dict[str, BackboneArm]
    seeds: int = 8
    first_seed: int = 0
    block: int = 8
    processes: int = 2
    batch: int = 16
    student_batch: int = 32
    model: LlamaShape = LlamaShape()
    pretraining: PretrainingConfig = PretrainingConfig()
    optimisation: Optimisation = Optimisation()
    chosen: dict[str, dict[str, Variation]] = field(default_factory=dict)
    ppo: PolicyTraining | None = None
    measure: MeasureConfig = MeasureConfig()
    primaries: tuple[ComparisonConfig, ...] = ()
    secondary: tuple[ComparisonConfig, ...] = ()
    kind: str = "backbone"

    def __post_init__(self) -> None:
        require(self, "kind", self.kind == "backbone", "'backbone'")
        for name in ("seeds", "block", "processes", "batch", "student_batch"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "first_seed", self.first_seed >= 0, "at least 0")
        for name in (*self.arms, *self.regimes):
            if not name.isidentifier():
                raise ValueError(f"names of arms and regimes must be letters, digits and underscores, got {name!r}.")
        for name, arm in self.arms.items():
            for other in (arm.of, arm.student):
                if other and other not in tuple(self.arms)[: tuple(self.arms).index(name)]:
                    raise ValueError(
                        f"arms.{name}: `of` and `student` must name arms that stand before it, got {other!r}."
                    )
            self._check_kinds(name, arm)
            if arm.most_seeds < 0 or arm.most_seeds % self.block:
                raise ValueError(
                    f"arms.{name}: `most_seeds` must be a multiple of the block of {self.block} seeds, got "
                    f"{arm.most_seeds}."
                )
        if self.ppo is not None:
            self.ppo.check(self.arms, {n: r.task for n, r in self.regimes.items()}, self.model, self.measure)
        for comparison in (*self.primaries, *self.secondary):
            for name in (comparison.arm, comparison.against):
                if name not in self.arms:
                    raise ValueError(f"a comparison must be of arms, {', '.join(self.arms)}, got {name!r}.")
                if comparison.optimiser not in self.optimisers(name):
                    raise ValueError(
                        f"a comparison under {comparison.optimiser} needs {name!r} to be run under it; all arms are "
                        "under best_of_n, and those in `ppo.arms` under ppo."
                    )
        for regime in self.chosen:
            if regime not in self.regimes:
                raise ValueError(f"`chosen` must be of regimes, {', '.join(self.regimes)}, got {regime!r}.")
        for regime in self.regimes if self.chosen else ():
            missing = [name for name in self.arms_of(regime) if len(self.variations(regime, name)) != 1]
            if missing:
                raise ValueError(
                    f"`chosen` must leave one variation of every arm of the regime {regime}; it does not of "
                    f"{', '.join(missing)}."
                )

    def _check_kinds(self, name: str, arm: BackboneArm) -> None:
        wanted = {"mixture": ("token",), "weight_average": ("dense",), "ensemble": ("dense", "sequence")}
        if arm.kind in wanted and self.arms[arm.of].kind not in wanted[arm.kind]:
            kinds = " or ".join(wanted[arm.kind])
            raise ValueError(f"arms.{name}: `of` must be an arm of kind {kinds}, got {arm.of!r}.")
        if arm.kind == "weight_average" and self.arms[arm.of].own_heads:
            raise ValueError(
                f"arms.{name}: `of` must be runs from a common head to average their weights, got {arm.of!r} with "
                "`own_heads`."
            )
        if arm.student and self.arms[arm.student].kind in ("mixture", "ensemble"):
            raise ValueError(f"arms.{name}: `student` must be one dense model, got the arm {arm.student!r}.")
        if arm.kind == "distilled" and self.base(arm.of) != self.base(arm.student or arm.of):
            raise ValueError(
                f"arms.{name}: `of` and `student` must come from one training, got {arm.of}, {arm.student}."
            )

    def arms_of(self, regime: str) -> tuple[str, ...]:
        """The arms of a regime."""
        return tuple(name for name in self.arms if name not in self.regimes[regime].without)

    def optimisers(self, arm: str) -> tuple[str, ...]:
        """What is run against an arm."""
        return OPTIMISERS if self.ppo is not None and arm in self.ppo.arms else OPTIMISERS[:1]

    def seeds_of(self, arm: str, block: tuple[int, ...], optimiser: str) -> int:
        """How many seeds of a block an arm is run on under an optimiser, the first ones."""
        most = self.arms[arm].most_seeds or self.seeds
        if optimiser == "ppo" and self.ppo is not None:
            most = min(most, self.ppo.seeds)
        return sum(seed < self.first_seed + most for seed in block)

    def base(self, arm: str) -> str:
        """The arm, trained on pairs, that an arm is made of."""
        return arm if self.arms[arm].kind in TRAINED else self.base(self.arms[arm].of)

    def variations(self, regime: str, arm: str) -> tuple[Variation, ...]:
        """The variations of an arm that are run: the chosen one, or all; of what it is made of the chosen one too."""
        if arm in self.chosen.get(regime, {}):
            return (self.chosen[regime][arm],)
        own = self.arms[arm]
        if own.kind in TRAINED:
            return tuple(Variation(steps, rate) for steps in own.steps for rate in own.rates)
        taught = [
            variation
            for variation in self.variations(regime, own.of)
            if (not own.of_steps or variation.steps in own.of_steps)
            and (not own.of_rates or variation.rate in own.of_rates)
        ]
        if own.kind == "distilled":
            return tuple(dataclasses.replace(v, student_rate=rate) for v in taught for rate in own.rates)
        return tuple(taught)

    def run_name(self, arm: str, variation: Variation) -> str:
        """An arm's name in the tables: its variation's too, where there are several."""
        return arm if self.chosen else f"{arm}_{variation}"

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The seeds, block by block."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return tuple(tuple(seeds[i : i + self.block]) for i in range(0, self.seeds, self.block))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BackboneStudy:
        """Builds a study from plain data; errors name the field by its path."""
        return build(cls, data, "study")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    def fingerprint(self, regime: str, arm: str, optimiser: str = "best_of_n") -> str:
        """What an arm's results depend on beside variation and seeds, in 16 hexadecimal digits."""

        def with_others(name: str) -> dict:
            made = dataclasses.asdict(self.arms[name])
            for unimportant in ("label", "rates", "of_rates", "of_steps", "chosen_by", "most_seeds"):
                del made[unimportant]
            if made["kind"] != "distilled":
                del made["steps"]
            for later in ("own_heads", "texts", "answers"):  # what was run before there was a choice still counts
                if made[later] == getattr(BackboneArm, later):
                    del made[later]
            return {**made, **{part: with_others(made[part]) for part in ("of", "student") if made[part]}}

        parts = {
            "task": dataclasses.asdict(self.regimes[regime].task),
            "arm": with_others(arm),
            **({"trained": dataclasses.asdict(start)} if (start := self.regimes[regime].trained) else {}),
            "measure": self.measure.fixed_kl,
            **{n: getattr(self, n) for n in ("batch", "student_batch")},
            **{n: dataclasses.asdict(getattr(self, n)) for n in ("model", "pretraining", "optimisation")},
        }
        if self.chosen:  # else the arm's name in the tables has its variation
            parts["chosen"] = dataclasses.asdict(*self.variations(regime, arm))
        if optimiser == "ppo":
            assert self.ppo is not None
            parts |= {
                "measure": [self.measure.ppo_fixed_kl, self.measure.ppo_window],
                "ppo": {**dataclasses.asdict(self.ppo.settings), "answer_tokens": self.ppo.answer_tokens},
            }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:16]


def with_choice(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A study's plain data with `chosen`, where it names a file in `folder`, replaced by what the file says.

    Raises:
        ValueError: there is no such file.
    """
    chosen = data.get("chosen")
    if not isinstance(chosen, str):
        return dict(data)
    path = folder / chosen
    if not path.is_file():
        raise ValueError(
            f"`chosen` must name a file beside the study's, got {chosen!r}; the search study's rates make it."
        )
    return {**data, "chosen": yaml.safe_load(path.read_text())}
