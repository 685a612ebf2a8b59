"""The configuration of a task on real checkpoints and data by name: who answers, who judges, which prompts and pairs.

How it is loaded is `checkpoints.py`'s business, how a task is made of it `checkpoint_task.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .reading import require

DTYPES = ("float32", "bfloat16")
PROMPT, ANSWER = "{prompt}", "{answer}"


@dataclass(frozen=True)
class DataConfig:
    """A data set, as `datasets.load_dataset` takes it.

    Attributes:
        name: on the Hugging Face hub, a local folder, or a format such as `json`, with `data_files`.
        config: which of the set's configurations.
        data_files: a path or pattern; `hf://datasets/...` reaches single files of the hub.
        split: which split.
    """

    name: str
    config: str | None = None
    data_files: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class PromptsConfig(DataConfig):
    """Prompts.

    Attributes:
        column: the instruction, as text.
        input_column: text that belongs to it where it is not empty; it follows after a blank line.
    """

    column: str = "instruction"
    input_column: str | None = None


@dataclass(frozen=True)
class PairsConfig(DataConfig):
    """Preference pairs; an answer is text, or a list of messages of which the last one is the answer.

    Attributes:
        prompt: column of the instruction, as text.
        chosen: column of the preferred answer.
        rejected: column of the other.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True)
class GoldConfig:
    """The gold reward model: a sequence classifier with one output, which is never trained.

    Attributes:
        name: a folder or hub name.
        template: what it reads, with `{prompt}` and `{answer}`; None takes its own chat template.
        pad_token: for a tokenizer without one.
        batch_size: answers a forward.
    """

    name: str
    template: str | None = None
    pad_token: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        whole = self.template is None or (PROMPT in self.template and ANSWER in self.template)
        require(self, "template", whole, "a text with {prompt} and {answer}, or nothing for the model's chat template")
        require(self, "batch_size", self.batch_size >= 1, "at least 1")


@dataclass(frozen=True)
class CheckpointTaskConfig:
    """A task on real checkpoints. The study's `model.folder` names where the dense reward model starts.

    Policy and reward models read the same tokens, so that they must share a tokenizer; gold reads text.

    Attributes:
        policy: causal language model that answers, a folder or hub name.
        gold: what stands in for the truth.
        prompts: what is answered.
        pairs: a preference data set; None makes pairs of the policy's answers to prompts of their own and labels them
            by gold (Gao et al., arXiv 2210.10760).
        template: what the policy reads, with `{prompt}`; None takes its chat template.
        pad_token: for a tokenizer without one, or one whose padding is its end token.
        dtype: what forwards compute in. `"bfloat16"` is autocast over fp32 weights, the gold model's aside; rewards
            then have 8 significant bits.
        train_pairs: training pairs.
        test_pairs: held-out pairs.
        label_noise: share of training pairs whose label is flipped.
        policy_prompts: prompts for the policies' training.
        selection_prompts: the first ones of these, for best-of-n.
        samples: answers to each of them.
        max_prompt_tokens: longer prompts are left out.
        max_answer_tokens: longest answer, its end token included; longer ones of `pairs` are left out.
        sample_batch: answers sampled at a time.
        kind: tells tasks apart.
    """

    policy: str
    gold: GoldConfig
    prompts: PromptsConfig
    pairs: PairsConfig | None = None
    template: str | None = None
    pad_token: str | None = None
    dtype: str = "float32"
    train_pairs: int = 8000
    test_pairs: int = 1000
    label_noise: float = 0.0
    policy_prompts: int = 1024
    selection_prompts: int = 64
    samples: int = 64
    max_prompt_tokens: int = 256
    max_answer_tokens: int = 128
    sample_batch: int = 64
    kind: Literal["checkpoints"] = "checkpoints"

    def __post_init__(self) -> None:
        sizes = ("train_pairs", "test_pairs", "policy_prompts", "selection_prompts", "max_prompt_tokens")
        for name in (*sizes, "sample_batch"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("samples", "max_answer_tokens"):
            require(self, name, getattr(self, name) >= 2, "at least 2")
        require(self, "dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        require(self, "label_noise", 0 <= self.label_noise < 1, "in [0, 1)")
        enough = self.selection_prompts <= self.policy_prompts
        require(self, "selection_prompts", enough, f"at most policy_prompts={self.policy_prompts}")
        whole = self.template is None or PROMPT in self.template
        require(self, "template", whole, "a text with {prompt}, or nothing for the policy's chat template")
