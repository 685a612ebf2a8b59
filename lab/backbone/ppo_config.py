"""What a study from a pretrained backbone says of PPO; how it is run is `ppo.py`'s business."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..config import MeasureConfig
from ..ppo import PPOConfig
from ..reading import require
from ..tasks.language import LanguageTaskConfig
from .llama import LlamaShape


@dataclass(frozen=True)
class PolicyTraining:
    """PPO as a second optimiser, which costs more than best-of-n: for some arms and some seeds.

    Every policy starts as its seed's pretrained backbone, which is a language model of the policy's answers.

    Attributes:
        arms: arms against which policies are trained.
        seeds: how many of the study's seeds, the first ones.
        answer_tokens: longest answer, its end token included.
        settings: of PPO.
    """

    arms: tuple[str, ...]
    seeds: int
    answer_tokens: int = 24
    settings: PPOConfig = PPOConfig()

    def __post_init__(self) -> None:
        require(self, "arms", len(self.arms) > 0, "at least one arm")
        require(self, "seeds", self.seeds >= 1, "at least 1")
        require(self, "answer_tokens", self.answer_tokens >= 2, "at least 2 (a token and the end)")

    def check(
        self, arms: Collection[str], tasks: Mapping[str, object], model: LlamaShape, measure: MeasureConfig
    ) -> None:
        """Whether the rest of the study goes with it.

        Args:
            arms: the study's.
            tasks: of each regime.
            model: size of the models.
            measure: where paths are read.

        Raises:
            ValueError: it doesn't; says what to change.
        """
        for name in self.arms:
            if name not in arms:
                raise ValueError(f"`ppo.arms` must be of arms, {', '.join(arms)}, got {name!r}.")
        for name, task in tasks.items():
            if not isinstance(task, LanguageTaskConfig):
                raise ValueError(
                    "`ppo` needs regimes of kind language, whose gold reward is known for whatever a policy says; the "
                    f"regime {name!r} isn't: put it into a study of its own."
                )
        if self.answer_tokens + 2 > model.longest:
            raise ValueError(
                f"`ppo.answer_tokens` must be at most model.longest - 2 = {model.longest - 2}, the positions that a "
                f"prompt leaves, got {self.answer_tokens}."
            )
        if self.settings.steps < 2:
            raise ValueError(
                f"`ppo.settings.steps` must be at least 2 for a curve to be fitted, got {self.settings.steps}."
            )
        if measure.ppo_window > self.settings.steps + 1:
            raise ValueError(
                f"`measure.ppo_window` must be at most the {self.settings.steps + 1} points of a path, got "
                f"{measure.ppo_window}."
            )
