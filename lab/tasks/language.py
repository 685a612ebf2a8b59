"""The synthetic task on a small language: answers have a structure that a backbone can be pretrained on.

Content tokens fall into latent classes and an answer is a Markov chain over classes, another one for each topic. The
gold reward values classes for the most part, single tokens for the rest. Filler, regimes, pairs and policy are those of
`synthetic.py`, whose content tokens are uniform, so that a language model of them has nothing to learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .base import Sequences, Task
from .synthetic import END, FILLER, PAD, GoldReward, SyntheticTaskConfig, policy_samples, task_of

_TOPIC_SHARE = (0.75, 0.66)  # a class's value: for all topics, and for each; together of variance 1
_CHAIN = (1.5, 0.7)  # logits of the next class: for all topics, and for each
_BONUS = 0.7  # of a pair of classes; there are fewer of them than of tokens


@dataclass(frozen=True)
class LanguageTaskConfig(SyntheticTaskConfig):
    """The language; fields of `SyntheticTaskConfig` as there.

    Attributes:
        classes: latent classes; divides `content_tokens`.
        structure: share of the gold reward's variance that classes explain, the rest being single tokens'.
        policy_filler_cap: most filler of a policy's answer, so that all seeds' answers have one width.
        corpus: answers of the policy, without labels, on which a backbone is pretrained.
        unlabelled: further ones, for distillation.
    """

    train_pairs: int = 800
    test_pairs: int = 500
    instruction_regimes: int = 4
    content_tokens: int = 32
    min_content: int = 4
    max_content: int = 9
    label_noise: float = 0.2
    shortcut_share: float = 0.5
    prompts: int = 12
    samples: int = 256
    policy_filler_rate: float = 0.5
    classes: int = 8
    structure: float = 0.8
    policy_filler_cap: int = 6
    corpus: int = 8192
    unlabelled: int = 4096
    kind: Literal["language"] = "language"  # type: ignore[assignment]  # the tag by which kinds are told apart

    @property
    def most_filler(self) -> int:
        """No answer of the policy has more filler."""
        return self.policy_filler_cap

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("classes", "policy_filler_cap", "corpus", "unlabelled"):
            if getattr(self, name) < 1:
                raise ValueError(f"LanguageTaskConfig: `{name}` must be at least 1, got {getattr(self, name)}.")
        if self.content_tokens % self.classes:
            raise ValueError(
                f"LanguageTaskConfig: `classes` must divide content_tokens={self.content_tokens}, got {self.classes}."
            )
        if not 0 <= self.structure <= 1:
            raise ValueError(f"LanguageTaskConfig: `structure` must be in [0, 1], got {self.structure}.")


class LanguageReward(GoldReward):
    """The gold reward, which values classes and tokens, and the chains that answers follow.

    Args:
        config: sizes and penalties.
        generator: draws values, bonuses and chains.
    """

    config: LanguageTaskConfig

    def __init__(self, config: LanguageTaskConfig, generator: torch.Generator) -> None:
        super().__init__(config, generator)
        classes, topics = config.classes, config.topics
        of_class, of_token = math.sqrt(config.structure), math.sqrt(1 - config.structure)
        member = torch.arange(config.content_tokens) // (config.content_tokens // classes)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        everywhere, here = _TOPIC_SHARE
        self.values = of_class * (everywhere * normal(1, classes) + here * normal(topics, classes))[:, member]
        self.values = self.values + of_token * normal(topics, config.content_tokens)
        pays = torch.rand(classes, classes, generator=generator) < config.bigram_share
        between = of_class * normal(classes, classes)[member][:, member]
        between = between + of_token * normal(config.content_tokens, config.content_tokens)
        self.bonus = _BONUS * config.bigram_scale * between * pays[member][:, member]
        everywhere, here = _CHAIN
        self.chain = torch.softmax(
            everywhere * normal(1, classes, classes) + here * normal(topics, classes, classes), -1
        )

    def content(self, topic: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        config = self.config
        state = torch.randint(config.classes, (len(topic),), generator=generator)
        states = [state]
        for _ in range(config.max_content - 1):
            state = torch.multinomial(self.chain[topic, state], 1, generator=generator)[:, 0]
            states.append(state)
        each = config.content_tokens // config.classes
        return torch.stack(states, 1) * each + torch.randint(
            each, (len(topic), config.max_content), generator=generator
        )


@dataclass(frozen=True)
class LanguageTask:
    """The task and the answers without labels.

    Attributes:
        task: as every task.
        corpus: what a backbone is pretrained on.
        unlabelled: what distillation scores.
    """

    task: Task
    corpus: Sequences
    unlabelled: Sequences


def make_language_task(config: LanguageTaskConfig, seed: int) -> LanguageTask:
    """Draws the language, its gold reward and all data from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    reward = LanguageReward(config, generator)
    task = task_of(reward, generator)
    corpus, unlabelled = (
        policy_samples(reward, config.topics, math.ceil(count / config.topics), generator).sequences
        for count in (config.corpus, config.unlabelled)
    )
    return LanguageTask(task, corpus.select(slice(0, config.corpus)), unlabelled.select(slice(0, config.unlabelled)))


def with_filler(sequences: Sequences, filler: torch.Tensor, generator: torch.Generator) -> Sequences:
    """The same answers with another amount of filler, strewn in at random places: counterfactual edits of the shortcut.

    Args:
        sequences: answers of this task that fit the width after the edit.
        filler: int64 [N], how many filler tokens each gets instead of its own.
        generator: draws the places.

    Raises:
        ValueError: an answer would not fit.
    """
    tokens, lengths = sequences.tokens, sequences.lengths
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    own = ((tokens == FILLER) & inside).sum(1)
    new_lengths = lengths - own + filler
    if int(new_lengths.max()) > tokens.shape[1]:
        raise ValueError(
            f"`filler` must fit the width {tokens.shape[1]}, got answers of {int(new_lengths.max())} tokens."
        )
    position = torch.arange(tokens.shape[1])
    body = (position >= 2) & (position < new_lengths[:, None] - 1)
    keys = torch.rand(tokens.shape, generator=generator).masked_fill(~body, 2.0)
    is_filler = keys.argsort(1).argsort(1) < filler[:, None]
    kept = inside & (tokens != FILLER)
    order = (~kept).long().argsort(dim=1, stable=True)  # what is no filler first, in its order
    rank = ((~is_filler).cumsum(1) - 1).clamp_min(0)
    edited = torch.where(is_filler, FILLER, tokens.gather(1, order.gather(1, rank)))
    edited = edited.masked_fill(position >= new_lengths[:, None], PAD)
    assert bool((edited.gather(1, new_lengths[:, None] - 1) == END).all())
    return Sequences(edited, new_lengths, sequences.pad_token_id)
