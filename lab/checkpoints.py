"""Real checkpoints and data by name: a policy with its tokenizer, a gold reward model that reads text, rows of a set.

Loads and checks; every failure says which field of the study named what, and what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checkpoint_config import ANSWER, PROMPT, CheckpointTaskConfig, DataConfig, GoldConfig
from .demo.measure import rewards_of
from .policy import PolicyModel
from .tasks import Sequences

T = TypeVar("T")


def autocast(dtype: str, device: str) -> contextlib.AbstractContextManager:
    """The context in which forwards compute in `dtype`; its backward must be taken outside."""
    if dtype == "float32":
        return contextlib.nullcontext()
    # no cache: one kept over an optimiser step would hold the weights from before it
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), cache_enabled=False)


@dataclass
class PromptTemplate:
    """How a policy reads instructions.

    Attributes:
        tokenizer: with a padding token that is not its end token.
        template: with `{prompt}`; None is the tokenizer's chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None

    def text(self, instruction: str) -> str:
        """What the policy reads; tokenising it as it stands gives `tokens`."""
        if self.template is not None:
            return self.template.replace(PROMPT, instruction)
        messages = [{"role": "user", "content": instruction}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        adds_bos = bos is not None and self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]
        return text.removeprefix(bos) if adds_bos else text  # the tokenizer would set it a second time

    def tokens(self, instructions: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts."""
        return self.tokenizer([self.text(instruction) for instruction in instructions])["input_ids"]

    def answer_tokens(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, each with the end token."""
        ids = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        return [[*row, self.tokenizer.eos_token_id] for row in ids]

    def answer_texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts of answers, without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


def load_prompt_template(config: CheckpointTaskConfig) -> PromptTemplate:
    """The policy's tokenizer, ready for prompts.

    Raises:
        ValueError: it cannot be loaded, has no chat template where one is needed, no end token, or no padding of its
            own.
    """
    tokenizer = _tokenizer("task.policy", config.policy)
    _set_padding("task.pad_token", tokenizer, config.pad_token, config.policy)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"`task.policy` must have an end token, and the tokenizer of {config.policy} has none.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer of {config.policy} must have a padding token other than its end token "
            f"{tokenizer.eos_token!r}, got {tokenizer.pad_token!r}; name a token that it has in `task.pad_token`."
        )
    if config.template is None and not tokenizer.chat_template:
        raise ValueError(
            f"{config.policy} has no chat template, so that `task.template` must say what it reads: a text with "
            f"{PROMPT}."
        )
    return PromptTemplate(tokenizer, config.template)


def load_policy(config: CheckpointTaskConfig, prompt_template: PromptTemplate, device: str) -> PolicyModel:
    """The policy in eval mode, fp32; it may say every token of its tokenizer but padding.

    Raises:
        ValueError: it cannot be loaded, or its positions do not suffice.
    """
    network = _named(
        "task.policy",
        config.policy,
        lambda: AutoModelForCausalLM.from_pretrained(config.policy, dtype=torch.float32),
    )
    check_positions("task.policy", network, config)
    tokenizer, end = prompt_template.tokenizer, prompt_template.tokenizer.eos_token_id
    # at temperature 1 from the whole distribution, ending in one token: not what the checkpoint would rather do
    network.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    network.config.pad_token_id = tokenizer.pad_token_id
    allowed = torch.arange(network.config.vocab_size) < len(tokenizer)
    allowed[tokenizer.pad_token_id] = False
    policy = PolicyModel(network.eval(), allowed, end, tokenizer.pad_token_id, config.max_answer_tokens)
    return policy.to(device)


def check_positions(where: str, model: PreTrainedModel, config: CheckpointTaskConfig) -> None:
    """Raises ValueError if the longest prompt and answer do not fit into a model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = config.max_prompt_tokens + config.max_answer_tokens
    if positions is not None and longest > positions:
        raise ValueError(
            f"`task.max_prompt_tokens` + `task.max_answer_tokens` must be at most the {positions} positions of "
            f"{where}, got {longest}."
        )


def check_reward_model(
    model: PreTrainedModel, name: str, prompt_template: PromptTemplate, config: CheckpointTaskConfig
) -> None:
    """Raises ValueError unless a reward model can read the policy's tokens."""
    tokenizer = _tokenizer("model.folder", name)
    ours, theirs = prompt_template.tokenizer.get_vocab(), tokenizer.get_vocab()
    different = [token for token, index in ours.items() if theirs.get(token) != index]
    if different:
        raise ValueError(
            f"`model.folder` must have the tokenizer of `task.policy`, since reward models read the policy's tokens; "
            f"{name} and {config.policy} differ in {len(different)} tokens, {different[0]!r} among them. Take two "
            "checkpoints of one family."
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if embeddings < len(prompt_template.tokenizer):
        raise ValueError(
            f"`model.folder` must embed all {len(prompt_template.tokenizer)} tokens of {config.policy}, and {name} has "
            f"{embeddings}; take two checkpoints of one family."
        )
    check_positions("model.folder", model, config)


class GoldModel:
    """The gold reward of an answer to an instruction, both as text.

    Args:
        config: which model, and what it reads.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: it cannot be loaded, is no reward model, or lacks a chat template or a padding token.
    """

    def __init__(self, config: GoldConfig, device: str, dtype: str) -> None:
        self.config = config
        self.tokenizer = _tokenizer("task.gold.name", config.name)
        _set_padding("task.gold.pad_token", self.tokenizer, config.pad_token, config.name)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"the gold model {config.name} has no padding token; name a token that it has in `task.gold.pad_token`."
            )
        if config.template is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"the gold model {config.name} has no chat template, so that `task.gold.template` must say what it "
                f"reads: a text with {PROMPT} and {ANSWER}, as it was trained."
            )
        load = AutoModelForSequenceClassification.from_pretrained
        model, info = _named(
            "task.gold.name",
            config.name,
            lambda: load(config.name, dtype=getattr(torch, dtype), output_loading_info=True),
        )
        if model.config.num_labels != 1 or info["missing_keys"]:
            lacks = f"lacks {sorted(info['missing_keys'])[0]}" if info["missing_keys"] else "has several outputs"
            raise ValueError(
                "`task.gold.name` must be a reward model, a sequence classifier with one output, and "
                f"{config.name} {lacks}."
            )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval()

    def __call__(self, instructions: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """Rewards, fp64 [N]."""
        texts = [self._text(i, a) for i, a in zip(instructions, answers, strict=True)]
        ids = self.tokenizer(texts, add_special_tokens=self.config.template is not None)["input_ids"]
        sequences = Sequences.from_lists(ids, self.tokenizer.pad_token_id)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and int(sequences.lengths.max()) > positions:
            raise ValueError(
                f"the gold model {self.config.name} reads at most {positions} tokens, and a prompt and its answer have "
                f"{int(sequences.lengths.max())}; lower `task.max_prompt_tokens` or `task.max_answer_tokens`."
            )
        with torch.autocast(self.model.device.type, enabled=False):
            return rewards_of(self.model, sequences, self.config.batch_size)

    def _text(self, instruction: str, answer: str) -> str:
        if self.config.template is not None:
            before, _, after = self.config.template.partition(ANSWER)
            return before.replace(PROMPT, instruction) + answer + after.replace(PROMPT, instruction)
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)


def load_columns(where: str, config: DataConfig, columns: Sequence[str]) -> list[list]:
    """Columns of a data set, each as a list.

    Args:
        where: the field that names the set, for errors.
        config: the set.
        columns: which of its columns.

    Raises:
        ValueError: it cannot be loaded, or lacks a column.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"`{where}` needs the package `datasets`, which is not installed: pip install 'ummrm[trl]'.")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(config.name, config.config, data_files=config.data_files, split=config.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"`{where}` must be a data set that this machine can reach, and {config.name!r} (data_files "
            f"{config.data_files!r}, split {config.split!r}) could not be loaded: {_first_line(error)} Sets with a "
            "loading script are refused by `datasets`: name: json and data_files reach their files."
        ) from error
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"`{where}` has no column {', '.join(missing)}; {config.name} has {', '.join(rows.column_names)}."
        )
    return [list(rows[name]) for name in columns]


def _tokenizer(where: str, name: str) -> PreTrainedTokenizerBase:
    return _named(where, name, lambda: AutoTokenizer.from_pretrained(name))


def _set_padding(where: str, tokenizer: PreTrainedTokenizerBase, token: str | None, name: str) -> None:
    if token is not None:
        if token not in tokenizer.get_vocab():
            raise ValueError(f"`{where}` must be a token that {name} has, got {token!r}.")
        tokenizer.pad_token = token


def _named(where: str, name: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{where}` must be a folder or a Hugging Face hub name that this machine can reach, and {name!r} could "
            f"not be loaded: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
