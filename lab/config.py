"""The configuration of a study: frozen dataclasses, read from YAML, every unknown or ill-typed field an error.

Says which regimes, seeds, arms and optimisers a study has and which comparison is its primary one. What an arm is made
of is `arms.py`'s business, how a study runs `run.py`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from ummrm import MergeConfig, UpcycleConfig

from .checkpoint_config import CheckpointTaskConfig
from .demo.config import ModelConfig, TrainConfig, plain_upcycle
from .online import OnlineConfig
from .policy import PolicyConfig
from .ppo import PPOConfig
from .reading import build, require
from .tasks import SyntheticTaskConfig

KINDS = ("dense", "dense_longer", "ensemble", "weight_average", "moe", "merged")
BUDGETS = ("steps", "flops")
RULES = ("mean", "worst", "uwo")
OPTIMISERS = ("best_of_n", "ppo", "rloo", "grpo")
ALPHAS = ("learned", "uniform")


@dataclass(frozen=True)
class RegimeConfig:
    """One regime of error: a task whose training pairs mislead a reward model in a known way.

    Attributes:
        task: the task, `kind: synthetic` (also where no kind is given) or `kind: checkpoints`; each seed of a study
            draws it anew.
        title: what the regime is, in words.
    """

    task: Annotated[SyntheticTaskConfig | CheckpointTaskConfig, Field(discriminator="kind")]
    title: str = ""


@dataclass(frozen=True)
class ArmConfig:
    """A reward model that a study compares.

    Attributes:
        kind: what it is made of (lab/README.md): `"dense"`, `"dense_longer"`, `"ensemble"`, `"weight_average"`, `"moe"`
            or `"merged"`.
        label: its name in tables and plots.
        budget: of `dense_longer`: continued training for as many steps as mixture and merge weights take (`"steps"`),
            or for as many floating-point operations (`"flops"`).
        rule: of `ensemble`: how normalised members' scores combine: their mean, the worst case, or mean minus variance
            (uncertainty-weighted, UWO; Coste et al., arXiv 2310.02743).
        uncertainty: UWO's weight of the variance.
        alpha: of `merged`: merge weights learned or left uniform.
        shared_share: of `merged`: lambda.
        dense: changes to the study's `dense` training, from which the arm starts.
        upcycle: of `moe` and `merged`: changes to the study's `upcycle`.
        training: of `moe`, `merged` and `dense_longer`: changes to the study's `moe` training.
        merge: of `merged`: changes to the study's `merge`.
        learning: of `merged`: changes to the study's `alpha` training.
        ppo: whether PPO is run against it.
        rloo: whether TRL's RLOO is, on a task on checkpoints.
        grpo: the same of TRL's GRPO.
    """

    kind: str
    label: str = ""
    budget: str = "steps"
    rule: str = "mean"
    uncertainty: float = 0.5
    alpha: str = "learned"
    shared_share: float = 0.5
    dense: dict[str, Any] = field(default_factory=dict)
    upcycle: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    learning: dict[str, Any] = field(default_factory=dict)
    ppo: bool = False
    rloo: bool = False
    grpo: bool = False

    def __post_init__(self) -> None:
        require(self, "kind", self.kind in KINDS, "one of " + ", ".join(KINDS))
        require(self, "budget", self.budget in BUDGETS, "one of " + ", ".join(BUDGETS))
        require(self, "rule", self.rule in RULES, "one of " + ", ".join(RULES))
        require(self, "uncertainty", self.uncertainty >= 0, "at least 0")
        require(self, "alpha", self.alpha in ALPHAS, "one of " + ", ".join(ALPHAS))
        require(self, "shared_share", 0 <= self.shared_share <= 1, "a number in [0, 1]")


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured of every reward model.

    Attributes:
        batch_size: sequences a batch when scoring.
        fixed_kl: best-of-n's gold reward is compared at this KL divergence in nats, between two n by interpolation over
            its root.
        ppo_fixed_kl: the same for PPO, RLOO and GRPO, where their path first gets there.
        ppo_window: points of such a path that are averaged before anything is read off it.
        reference_pairs: training pairs over which an ensemble's members are normalised.
        specialisation_points: times during the mixture's training at which its experts are measured, the end included.
        specialisation_pairs: held-out pairs for that.
        mixtures: whether merged models report on the mixtures that they come from: their gates at the end, and how far
            experts are from each other and from the dense model's FFN.
        latency_batch: sequences in the batch whose forward is timed.
        latency_rounds: timed forwards, of which the best counts.
    """

    batch_size: int = 256
    fixed_kl: float = 4.0
    ppo_fixed_kl: float = 4.0
    ppo_window: int = 5
    reference_pairs: int = 256
    specialisation_points: int = 3
    specialisation_pairs: int = 200
    mixtures: bool = False
    latency_batch: int = 64
    latency_rounds: int = 7

    def __post_init__(self) -> None:
        for f in (f for f in dataclasses.fields(self) if f.name != "mixtures"):
            least = 0 if f.name.endswith("kl") else 1
            require(self, f.name, getattr(self, f.name) >= least, f"at least {least}")


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison of two arms, seed by seed, fixed before any run that could show its outcome.

    Attributes:
        arm: the arm in question.
        against: what it is compared with.
        optimiser: under which optimiser.
        outcome: a column of runs.csv.
    """

    arm: str = "merged"
    against: str = "dense_longer"
    optimiser: str = "best_of_n"
    outcome: str = "gold_at_kl"

    def __post_init__(self) -> None:
        require(self, "optimiser", self.optimiser in OPTIMISERS, "one of " + ", ".join(OPTIMISERS))


@dataclass(frozen=True)
class StudyConfig:
    """A study: every arm in every regime, over all seeds, under best-of-n and, where an arm asks for it, PPO.

    Attributes:
        name: for titles and folders.
        regimes: regimes by name.
        model: the dense reward model, built anew for each seed.
        arms: arms by name, in the order of tables.
        seeds: number of seeds; seed s is the number s, 0 and up.
        first_seed: the first one.
        dense: training of the dense model and of each ensemble member.
        upcycle: `ummrm.UpcycleConfig`.
        moe: training of the mixture, and continued training of dense models.
        merge: `ummrm.MergeConfig`; an arm's `shared_share` replaces its lambda.
        alpha: learning of the merge weights.
        members: members of ensembles and weight averages.
        policy: the policy that PPO starts from; a task on checkpoints names its own.
        ppo: PPO.
        rloo: TRL's RLOO.
        grpo: TRL's GRPO.
        measure: what is measured.
        primary: the primary comparison, made in every regime.
        secondary: further comparisons, made in every regime, corrected together.
        device: where models run.
        processes: worker processes, one thread each.
    """

    name: str
    regimes: dict[str, RegimeConfig]
    model: ModelConfig
    arms: dict[str, ArmConfig]
    seeds: int = 6
    first_seed: int = 0
    dense: TrainConfig = TrainConfig()
    upcycle: UpcycleConfig = UpcycleConfig()
    moe: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    alpha: TrainConfig = TrainConfig(schedule="constant", weight_decay=0.0)
    members: int = 4
    policy: PolicyConfig = PolicyConfig()
    ppo: PPOConfig = PPOConfig()
    rloo: OnlineConfig = OnlineConfig()
    grpo: OnlineConfig = OnlineConfig()
    measure: MeasureConfig = MeasureConfig()
    primary: ComparisonConfig = ComparisonConfig()
    secondary: tuple[ComparisonConfig, ...] = ()
    device: str = "cpu"
    processes: int = 2

    def __post_init__(self) -> None:
        if self.merge.shared_share is None:  # said, so that a study's plain data is whole; an arm's own replaces it
            object.__setattr__(self, "merge", dataclasses.replace(self.merge, shared_share=0.5))
        require(self, "seeds", self.seeds >= 1, "at least 1")
        require(self, "first_seed", self.first_seed >= 0, "at least 0")
        require(self, "members", self.members >= 2, "at least 2")
        require(self, "processes", self.processes >= 1, "at least 1")
        require(self, "regimes", len(self.regimes) > 0, "at least one regime")
        for name in (*self.arms, *self.regimes):
            if not name.isidentifier():
                raise ValueError(f"names of arms and regimes must be letters, digits and underscores, got {name!r}.")
        for comparison in (self.primary, *self.secondary):
            for name in (comparison.arm, comparison.against):
                if name not in self.arms:
                    raise ValueError(f"a comparison must be of arms, {', '.join(self.arms)}, got {name!r}.")
                if comparison.optimiser not in self.optimisers(name):
                    optimiser = comparison.optimiser
                    raise ValueError(
                        f"a comparison under {optimiser.upper()} needs `{optimiser}: true` of the arm {name!r}."
                    )
        named = [name for name, regime in self.regimes.items() if isinstance(regime.task, CheckpointTaskConfig)]
        if named and (len(named) < len(self.regimes) or self.model.model_type is not None):
            raise ValueError(
                f"the regime {named[0]!r} is on checkpoints, so that all must be, and `model.folder` must name the "
                "checkpoint from which the dense reward model starts."
            )
        online = [name for name in self.arms if {"rloo", "grpo"} & set(self.optimisers(name))]
        if online and not named:
            raise ValueError(
                f"`rloo` and `grpo` of the arm {online[0]!r} need a task on checkpoints: TRL's trainers read text."
            )
        for name in {name for arm in online for name in self.optimisers(arm)} & {"rloo", "grpo"}:
            points, window = getattr(self, name).measurements, self.measure.ppo_window
            if window > points:
                raise ValueError(
                    f"`measure.ppo_window` must be at most the {points} measurements of {name.upper()}, got {window}; "
                    f"lower it, or {name}.measure_every."
                )
        for name in self.arms:
            self.resolve(name)  # an impossible change to a stage shows here, before anything is trained

    def resolve(self, arm: str) -> ResolvedArm:
        """The stages that an arm goes through, its changes applied.

        Raises:
            ValueError: a change names an unknown field or gives a wrong value.
        """
        config = self.arms[arm]
        where = f"arms.{arm}"
        share = {"shared_share": config.shared_share}
        return ResolvedArm(
            dense=_changed(self.dense, config.dense, f"{where}.dense"),
            upcycle=_changed(self.upcycle, config.upcycle, f"{where}.upcycle"),
            moe=_changed(self.moe, config.training, f"{where}.training"),
            merge=_changed(self.merge, {**share, **config.merge}, f"{where}.merge"),
            alpha=_changed(self.alpha, config.learning, f"{where}.learning"),
        )

    @property
    def primaries(self) -> tuple[ComparisonConfig, ...]:
        """The primary comparisons: here one."""
        return (self.primary,)

    @property
    def mixture(self) -> str | None:
        """The arm that is the primary comparison's arm before merging; None where the study has none."""
        wanted = self.resolve(self.primary.arm)
        for name, arm in self.arms.items():
            stages = self.resolve(name)
            if arm.kind == "moe" and (stages.dense, stages.upcycle, stages.moe) == (
                wanted.dense,
                wanted.upcycle,
                wanted.moe,
            ):
                return name
        return None

    def label(self, arm: str) -> str:
        """An arm's name in tables and plots."""
        return self.arms[arm].label or arm

    def title(self, regime: str) -> str:
        """A regime in words."""
        return self.regimes[regime].title or regime

    def optimisers(self, arm: str) -> tuple[str, ...]:
        """What is run against an arm."""
        return ("best_of_n", *(name for name in OPTIMISERS[1:] if getattr(self.arms[arm], name)))

    @property
    def seed_range(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudyConfig:
        """Builds a study from plain data, as YAML gives it.

        Raises:
            ValueError: an unknown field, a missing one, a wrong type or value; names the field by its path.
        """
        return build(cls, _with_kinds(data), "study")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "upcycle": plain_upcycle(self.upcycle)}

    def fingerprint(self, regime: str, arm: str, optimiser: str) -> str:
        """What one unit's result depends on beside its seed, in 16 hexadecimal digits.

        Other arms, other regimes, labels and the number of seeds and processes are left out, so that a study can grow.
        """
        resolved = self.resolve(arm)
        made = dataclasses.asdict(self.arms[arm])
        stages = {**dataclasses.asdict(resolved), "upcycle": plain_upcycle(resolved.upcycle)}
        for name in ("rloo", "grpo", "dense"):  # `dense` is among the stages
            del made[name]
        measure = dataclasses.asdict(self.measure)
        if not measure["mixtures"]:
            del measure["mixtures"]  # so that units from before it existed stay good
        task = dataclasses.asdict(self.regimes[regime].task)
        del task["kind"]  # the other fields say it
        parts = {
            "regime": task,
            "arm": {**made, "label": "", "ppo": False},
            "dense": stages.pop("dense"),
            "stages": stages,
            "upcycle": plain_upcycle(self.upcycle),
            **{name: dataclasses.asdict(getattr(self, name)) for name in ("model", "moe", "merge", "alpha")},
            "measure": measure,
            "members": self.members,
            "device": self.device,
        }
        if optimiser == "ppo":
            parts |= {"policy": dataclasses.asdict(self.policy), "ppo": dataclasses.asdict(self.ppo)}
        elif optimiser != "best_of_n":
            parts[optimiser] = dataclasses.asdict(getattr(self, optimiser))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ResolvedArm:
    """The stages of one arm: dense training, upcycling, the mixture's training, merging, learning of alpha."""

    dense: TrainConfig
    upcycle: UpcycleConfig
    moe: TrainConfig
    merge: MergeConfig
    alpha: TrainConfig


def _with_kinds(data: Any) -> Any:
    """A study's plain data with `kind: synthetic` for tasks that name none."""
    if not isinstance(data, Mapping) or not isinstance(data.get("regimes"), Mapping):
        return data  # for `build` to refuse
    regimes = dict(data["regimes"])
    for name, regime in regimes.items():
        if isinstance(regime, Mapping) and isinstance(regime.get("task"), Mapping):
            regimes[name] = {**regime, "task": {"kind": SyntheticTaskConfig.kind, **regime["task"]}}
    return {**data, "regimes": regimes}


def _changed(stage, changes: Mapping[str, Any], where: str):
    """A copy of a stage's configuration with some fields changed."""
    plain = plain_upcycle(stage) if isinstance(stage, UpcycleConfig) else dataclasses.asdict(stage)
    return build(type(stage), {**plain, **changes}, where)
