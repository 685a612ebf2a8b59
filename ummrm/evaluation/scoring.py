"""Rewards of texts by any reward model that transformers loads, ours or not: tokens, limits, batches by length.

Tokens are made as TRL's RewardTrainer makes them, so that training and evaluation agree: a conversation by the
tokenizer's chat template, a string with the end-of-sequence token behind it unless it ends in one. Batches are
`hf/ensembles.py`'s business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from ..hf.ensembles import check_reward_model, has_members, score_texts
from ..hf.loading import load_checkpoint
from ..hf.texts import Text, many_token_ids, token_ids
from .texts import flattened

_NO_LIMIT = 1_000_000  # what a tokenizer without a limit says is 10^30
_POSITIONS = ("position_embeddings", "wpe", "embed_positions")


class ScoringError(ValueError):
    """A model that can't score, or texts that it can't score; says what was expected and the remedy."""


@dataclass(frozen=True)
class Scores:
    """Rewards of N texts, in the order of the texts.

    Attributes:
        rewards: fp64 [N], raw: no normalisation is applied. Not finite where the model's are not.
        members: fp64 [N, E], every member's reward where they were asked for.
        tokens: int64 [N], tokens of each text before anything was cut off.
        cut: bool [N], whether a text was longer than the limit, and scored by its part within.
    """

    rewards: np.ndarray
    members: np.ndarray | None
    tokens: np.ndarray
    cut: np.ndarray

    @property
    def spread(self) -> np.ndarray | None:
        """fp64 [N], the members' standard deviation (over E, not E - 1)."""
        return None if self.members is None else self.members.std(1)


class RewardScorer:
    """Scores texts with a reward model.

    Args:
        model: gives one reward a sequence. A mixture assigned by sequence gives its members' mean, or the member's that
            its configuration's `evaluation` names. If its configuration names no padding token, the tokenizer's (or its
            end-of-sequence token, as TRL takes it) is set there.
        tokenizer: the model's.
        name: for people.
        batch_size: texts a forward.
        max_length: most tokens of a text; a longer one is cut there on the tokenizer's truncation side, keeps the
            special token at its end, and is marked. None: as many as tokenizer and model say they take.
        members: also give every member's reward.
        flatten: score a conversation by its texts with an empty line between them if the tokenizer has no chat
            template; otherwise that is an error.

    Attributes:
        model: it, in evaluation mode while it scores.
        tokenizer: its tokenizer.
        name: for people.
        max_length: the limit in force; None if there is none.

    Raises:
        TypeError: the model has no reward head.
        ValueError: it has several labels; `members` of a model that has none; or neither tokenizer nor configuration
            name a padding token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        batch_size: int = 16,
        max_length: int | None = None,
        members: bool = False,
        flatten: bool = False,
    ) -> None:
        for argument, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ScoringError(f"`{argument}` must be an integer of at least 1, got {value!r}.")
        check_reward_model(model, "model")
        if members and not has_members(model):
            raise ScoringError(
                f"`members` must be False for {name or type(model).__name__}, which has none; they are those of a "
                'mixture upcycled with assignment="sequence".'
            )
        self.model, self.tokenizer, self.name = model, tokenizer, name or type(model).__name__
        self.batch_size, self.members, self.flatten = batch_size, members, flatten
        self._check_padding()
        limits = [limit for limit in (tokenizer.model_max_length, _positions(model)) if limit and limit < _NO_LIMIT]
        self.max_length: int | None = min([*limits, *([max_length] if max_length is not None else [])], default=None)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        name: str | None = None,
        **options: Any,
    ) -> RewardScorer:
        """A scorer of the model in a folder or on the hub, every tensor of it.

        Args:
            source: a folder or a hub name.
            device: where it scores.
            dtype: what it computes in; None: as it was saved.
            revision: of a hub name: a branch, tag or commit.
            trust_remote_code: run Python code that comes with the model. It can do whatever you can.
            name: for people; by default the folder's or the hub's.
            options: as for `RewardScorer`.

        Raises:
            OSError: there is no such folder, or no tokenizer beside the model.
            TypeError, ValueError: the checkpoint is no whole reward model with one label; or as for `RewardScorer`.
        """
        where: dict[str, Any] = {} if revision is None else {"revision": revision}
        more: dict[str, Any] = where if dtype is None else {**where, "dtype": dtype}
        model: Any = load_checkpoint(source, trust_remote_code=trust_remote_code, **more)
        check_reward_model(model, str(source))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
        path = os.fspath(source)
        model.to(device)
        return cls(model, tokenizer, name=name or (Path(path).name if os.path.isdir(path) else path), **options)

    def tokens(self, text: Text) -> list[int]:
        """All tokens of a text, however many.

        Raises:
            ValueError: a conversation, which the tokenizer has no chat template for, or one that its template refuses.
        """
        try:
            return token_ids(self.tokenizer, flattened(text) if self.flattens(text) else text)
        except ValueError:
            raise
        except Exception as error:  # a template raises what it likes: jinja2's own errors, and what its code meets
            raise ScoringError(f"the chat template can't be applied: {' '.join(str(error).split())[:200]}") from error

    def tokens_of_many(self, texts: Sequence[Text]) -> list[list[int]]:
        """`tokens` of each text; strings are taken together, which is faster."""
        try:
            strings = iter(many_token_ids(self.tokenizer, [text for text in texts if isinstance(text, str)]))
        except Exception:  # of one of them, which alone says what is wrong
            return [self.tokens(text) for text in texts]
        return [next(strings) if isinstance(text, str) else self.tokens(text) for text in texts]

    def flattens(self, text: Text) -> bool:
        """Whether a text is a conversation that is scored as plain text."""
        return self.flatten and not isinstance(text, str) and not getattr(self.tokenizer, "chat_template", None)

    def score(self, texts: Sequence[Text], *, progress: str | None = None) -> Scores:
        """Rewards of texts.

        Args:
            texts: strings and conversations.
            progress: what a progress bar is called; None shows none.

        Raises:
            ValueError: a text without tokens, or a conversation that the tokenizer has no template for.
        """
        return self.score_tokens(self.tokens_of_many(texts), progress=progress)

    def score_tokens(self, ids: Sequence[list[int]], *, progress: str | None = None) -> Scores:
        """Rewards of texts given by all their tokens; as `score`."""
        lengths = np.array([len(text) for text in ids], dtype=np.int64)
        if not len(ids):
            members = np.zeros((0, self.model.config.upcycle_config.num_experts)) if self.members else None
            return Scores(np.zeros(0), members, lengths, np.zeros(0, dtype=bool))
        cut = lengths > self.max_length if self.max_length is not None else np.zeros(len(ids), dtype=bool)
        within = [self._within(text) if over else text for text, over in zip(ids, cut, strict=True)]
        found = score_texts(self.model, within, self.batch_size, progress=progress).numpy()
        rewards = found[:, 0]
        if has_members(self.model):
            evaluation = self.model.config.upcycle_config.evaluation
            rewards = found.mean(1) if evaluation == "mean" else found[:, evaluation]
        return Scores(rewards, found if self.members else None, lengths, cut)

    def _within(self, ids: list[int]) -> list[int]:
        """As many tokens as are allowed: the model reads the special token at an end, which so must stay."""
        limit, special = self.max_length, set(self.tokenizer.all_special_ids)
        assert limit is not None
        if self.tokenizer.truncation_side == "left":
            first = ids[:1] if ids[0] in special and limit > 1 else []
            return [*first, *ids[len(ids) - limit + len(first) :]]
        last = ids[-1:] if ids[-1] in special and limit > 1 else []
        return [*ids[: limit - len(last)], *last]

    def _check_padding(self) -> None:
        config = self.model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is not None:
            return
        token = self.tokenizer.pad_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        size = self.model.get_input_embeddings().num_embeddings
        if token is None or token >= size:
            what = "neither names one" if token is None else f"the tokenizer's, {token}, is outside the {size} tokens"
            raise ScoringError(
                f"{self.name} must have a padding token to score texts of several lengths together, and {what}; set "
                "pad_token_id in its config.json, or pad_token in its tokenizer."
            )
        config.pad_token_id = token


def _positions(model: Any) -> int | None:
    """How many positions the model has; None if it does not say."""
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = [said] if isinstance(said, int) and said > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # RoBERTa and its kin count positions from behind the padding's index
            found.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(found, default=None)
