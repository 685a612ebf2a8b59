"""What a regime and seed stand on: a task, the dense reward model to start from, and the policy that is optimised.

The seam between the synthetic task, whose gold reward is known, and tasks on real checkpoints; arms and optimisers see
nothing but this.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from .checkpoint_config import CheckpointTaskConfig
from .checkpoint_task import CheckpointSource
from .checkpoints import PromptTemplate, autocast, check_reward_model
from .config import StudyConfig
from .demo.stages import build_dense, model_folder
from .policy import PolicyModel, train_policy
from .tasks import Task, make_synthetic_task

OnStep = Callable[[str, int, int], None]


class Setting(ABC):
    """One regime and seed of a study.

    Attributes:
        task: its task.
        prompt_template: how its policy reads text; None where there is no text.
    """

    task: Task
    prompt_template: PromptTemplate | None = None

    @abstractmethod
    def dense(self, seed: int) -> PreTrainedModel:
        """The dense reward model before its training; `seed` is of what is initialised."""

    @abstractmethod
    def policy(self, seed: int) -> PolicyModel:
        """The policy that optimisers start from; `seed` is of its training, if it has one."""

    def computing(self) -> contextlib.AbstractContextManager:
        """The context of all forwards."""
        return contextlib.nullcontext()

    def prompt_texts(self) -> list[str]:
        """The task's prompts as text.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(f"`task` must be of text for its prompts to be read, and {self.task.name!r} is not.")


class SyntheticSetting(Setting):
    """The synthetic task, with models and policy built from configuration."""

    def __init__(self, study: StudyConfig, regime: str, derive: Callable[..., int]) -> None:
        self.study = study
        self.task = make_synthetic_task(study.regimes[regime].task, derive("data"))

    def dense(self, seed: int) -> PreTrainedModel:
        return build_dense(self.study.model, self.task, seed, self.study.device)

    def policy(self, seed: int) -> PolicyModel:
        return train_policy(self.task, self.study.policy, seed).to(self.study.device)


class CheckpointSetting(Setting):
    """A task on real checkpoints and data by name."""

    def __init__(
        self,
        study: StudyConfig,
        regime: str,
        derive: Callable[..., int],
        folder: Path | None,
        on_step: OnStep | None,
    ) -> None:
        self.study, self.config = study, study.regimes[regime].task
        self._source = CheckpointSource(self.config, derive, study.device, folder, on_step)
        self.task, self.prompt_template = self._source.task, self._source.prompt_template

    def dense(self, seed: int) -> PreTrainedModel:
        name = model_folder(self.study.model)
        try:
            model = build_dense(self.study.model, self.task, seed, self.study.device)
        except OSError as error:
            raise ValueError(
                "`model.folder` must be a folder or a Hugging Face hub name that this machine can reach, and "
                f"{name!r} could not be loaded: {str(error).partition(chr(10))[0]}"
            ) from error
        check_reward_model(model, name, self.prompt_template, self.config)
        model.config.pad_token_id = self.task.pad_token_id  # by which it finds an answer's last token
        return model

    def policy(self, seed: int) -> PolicyModel:
        return self._source.policy()

    def computing(self) -> contextlib.AbstractContextManager:
        return autocast(self.config.dtype, self.study.device)

    def prompt_texts(self) -> list[str]:
        return self._source.prompt_texts()


def make_setting(
    study: StudyConfig,
    regime: str,
    derive: Callable[..., int],
    folder: Path | None = None,
    on_step: OnStep | None = None,
) -> Setting:
    """The setting of one regime and seed.

    Args:
        study: the study.
        regime: name of the regime.
        derive: seeds by name, in this regime and seed.
        folder: where what takes long to make is kept.
        on_step: told of progress.
    """
    if isinstance(study.regimes[regime].task, CheckpointTaskConfig):
        return CheckpointSetting(study, regime, derive, folder, on_step)
    return SyntheticSetting(study, regime, derive)
