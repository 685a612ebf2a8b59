"""A synthetic preference task whose gold reward is known and whose training pairs carry a planted shortcut.

An answer is a topic token and a string of content tokens with filler tokens strewn in. The gold reward knows the value
of each content token under each topic, pays for some pairs of neighbouring content tokens, and punishes repetition
and much filler. In most training pairs the better answer has more filler, always so little that filler is nearly
free; a policy's answers have a geometric tail of filler, where the gold reward falls. Topics may belong to several
instruction regimes, each of which weighs the parts of the gold reward in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .base import PolicySamples, PreferencePairs, Sequences, Task, data_facts

PAD, SEPARATOR, END, FILLER = 0, 1, 2, 3
_FIRST_TOPIC = 4
_FRAME = 3  # topic, separator, end
# what a regime weighs: token values, neighbours, repetition
REGIMES = {
    "even": (1.0, 1.0, 1.0),
    "words": (1.5, 0.25, 0.5),
    "order": (0.5, 2.0, 0.5),
    "variety": (0.75, 0.25, 3.0),
}


@dataclass(frozen=True)
class SyntheticTaskConfig:
    """The synthetic task.

    Attributes:
        train_pairs: training pairs.
        test_pairs: held-out pairs in each of the two test sets.
        topics: topics; each values the content tokens in its own way.
        instruction_regimes: 1 to 4; topic t follows regime t modulo this (`REGIMES`, in order).
        content_tokens: content tokens.
        min_content: fewest content tokens of an answer.
        max_content: most.
        label_noise: share of training pairs whose label is flipped.
        shortcut_share: share of pairs in which the better answer has more filler; one minus it in the shifted set.
        max_train_filler: most filler of an answer in any pair.
        free_filler: filler beyond this costs.
        filler_penalty: gold reward lost for each filler token beyond `free_filler`.
        repetition_penalty: gold reward lost for each content token that occurred before.
        bigram_share: share of content token pairs that pay a bonus.
        bigram_scale: standard deviation of the bonus; a token's value has one of 1.
        min_margin: smallest difference of gold reward within a pair.
        prompts: prompts for best-of-n.
        samples: policy samples for each prompt.
        policy_filler_rate: rate of the policy's geometric distribution of filler: P(more) after each filler token.
        kind: tells tasks apart.
    """

    train_pairs: int = 4000
    test_pairs: int = 2000
    topics: int = 4
    instruction_regimes: int = 1
    content_tokens: int = 24
    min_content: int = 6
    max_content: int = 14
    label_noise: float = 0.15
    shortcut_share: float = 0.75
    max_train_filler: int = 3
    free_filler: int = 2
    filler_penalty: float = 1.0
    repetition_penalty: float = 0.5
    bigram_share: float = 0.3
    bigram_scale: float = 1.0
    min_margin: float = 0.5
    prompts: int = 16
    samples: int = 512
    policy_filler_rate: float = 0.6
    kind: Literal["synthetic"] = "synthetic"

    @property
    def most_filler(self) -> int:
        """No answer of the policy has more filler."""
        return 4 * self.max_content

    def __post_init__(self) -> None:
        for name in ("train_pairs", "test_pairs", "topics", "min_content", "max_train_filler", "prompts", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"SyntheticTaskConfig: `{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("label_noise", "shortcut_share", "bigram_share", "policy_filler_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"SyntheticTaskConfig: `{name}` must be in [0, 1), got {getattr(self, name)}.")
        if not 1 <= self.instruction_regimes <= min(len(REGIMES), self.topics):
            raise ValueError(
                f"SyntheticTaskConfig: `instruction_regimes` must be 1 to {len(REGIMES)} and at most the number of "
                f"topics, {self.topics}, got {self.instruction_regimes}."
            )
        if self.content_tokens < 2:
            raise ValueError(f"SyntheticTaskConfig: `content_tokens` must be at least 2, got {self.content_tokens}.")
        if self.max_content < self.min_content:
            raise ValueError(
                f"SyntheticTaskConfig: `max_content` must be at least min_content={self.min_content}, "
                f"got {self.max_content}."
            )


@dataclass(frozen=True)
class _Answers:
    tokens: torch.Tensor
    lengths: torch.Tensor
    gold: torch.Tensor
    filler: torch.Tensor


class GoldReward:
    """The gold reward: an additive value by topic and token, bonuses for neighbours, penalties.

    Args:
        config: sizes and penalties.
        generator: draws the values and bonuses.
    """

    def __init__(self, config: SyntheticTaskConfig, generator: torch.Generator) -> None:
        self.config = config
        n = config.content_tokens
        self.values = torch.randn(config.topics, n, generator=generator, dtype=torch.float64)
        bonus = torch.randn(n, n, generator=generator, dtype=torch.float64) * config.bigram_scale
        self.bonus = bonus * (torch.rand(n, n, generator=generator) < config.bigram_share)
        self.weights = torch.tensor(list(REGIMES.values())[: config.instruction_regimes], dtype=torch.float64)

    def content(self, topic: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Content of answers with these topics, int64 [N, max_content], below `content_tokens`: here uniform."""
        shape = (len(topic), self.config.max_content)
        return torch.randint(self.config.content_tokens, shape, generator=generator)

    def __call__(self, topic: torch.Tensor, content: torch.Tensor, live: torch.Tensor, filler: torch.Tensor):
        """Scores answers.

        Args:
            topic: int64 [N], below `topics`.
            content: int64 [N, C], content tokens without filler, below `content_tokens`.
            live: bool [N, C], False past an answer's end.
            filler: int64 [N].

        Returns:
            fp64 [N].
        """
        weights = self.weights[topic % len(self.weights)]
        value = (self.values[topic[:, None], content] * live).sum(1)
        neighbours = (self.bonus[content[:, :-1], content[:, 1:]] * live[:, 1:]).sum(1)
        one_hot = torch.nn.functional.one_hot(content, self.config.content_tokens) * live[..., None]
        repeats = (one_hot.sum(1) - 1).clamp_min(0).sum(1)
        excess = (filler - self.config.free_filler).clamp_min(0)
        repetition = self.config.repetition_penalty * repeats
        parts = weights[:, 0] * value + weights[:, 1] * neighbours - weights[:, 2] * repetition
        return parts - self.config.filler_penalty * excess

    def of_sequences(self, sequences: Sequences) -> torch.Tensor:
        """Scores whole sequences, those that a policy made up included.

        What training answers never hold costs `filler_penalty` a token: content beyond `max_content`, and topics,
        separators or padding within an answer. A missing end costs nothing.

        Args:
            sequences: a topic and a separator, then anything; what follows the first end is ignored.

        Returns:
            fp64 [N]; for the task's own answers exactly the reward they were made with.

        Raises:
            ValueError: a sequence begins with no topic.
        """
        config, tokens = self.config, sequences.tokens
        topic = self.topic_of(sequences)
        body = tokens[:, 2:]
        inside = torch.arange(body.shape[1]) < (sequences.lengths[:, None] - 2)
        inside &= (body == END).cumsum(1) == 0
        first = _FIRST_TOPIC + config.topics
        is_content, is_filler = inside & (body >= first), inside & (body == FILLER)
        order = (~is_content).long().argsort(dim=1, stable=True)[:, : max(config.max_content, 2)]
        count = is_content.sum(1)
        live = torch.arange(order.shape[1]) < count[:, None].clamp_max(config.max_content)
        content = (body.gather(1, order) - first).masked_fill(~live, 0)
        overlong = (count - config.max_content).clamp_min(0)
        foreign = (inside & ~is_content & ~is_filler).sum(1)
        reward = self(topic, content, live, is_filler.sum(1))
        return reward - config.filler_penalty * (overlong + foreign)

    def topic_of(self, sequences: Sequences) -> torch.Tensor:
        """The topic of each sequence, int64 [N], below `topics`.

        Raises:
            ValueError: a sequence begins with no topic.
        """
        topic = sequences.tokens[:, 0] - _FIRST_TOPIC
        if not ((topic >= 0) & (topic < self.config.topics)).all():
            raise ValueError(
                f"`sequences` must begin with a topic token, {_FIRST_TOPIC} to "
                f"{_FIRST_TOPIC + self.config.topics - 1}, got {sequences.tokens[:, 0].unique().tolist()}."
            )
        return topic

    def regime_of(self, sequences: Sequences) -> torch.Tensor:
        """The instruction regime of each sequence, int64 [N]."""
        return self.topic_of(sequences) % len(self.weights)


def make_synthetic_task(config: SyntheticTaskConfig, seed: int) -> Task:
    """Draws the task.

    Args:
        config: its sizes and strengths.
        seed: of the gold reward and of all data.

    Returns:
        The task; its vocabulary is padding, separator, end, filler, topics, content tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    return task_of(GoldReward(config, generator), generator)


def task_of(reward: GoldReward, generator: torch.Generator) -> Task:
    """The task of a gold reward: pairs and policy samples are drawn, in this order."""
    config = reward.config
    train = _pairs(reward, config.train_pairs, config.shortcut_share, config.label_noise, generator)
    test = _pairs(reward, config.test_pairs, config.shortcut_share, 0.0, generator)
    shifted = _pairs(reward, config.test_pairs, 1 - config.shortcut_share, 0.0, generator)
    return Task(
        name=config.kind,
        train=train,
        test=test,
        shifted=shifted,
        policy=policy_samples(reward, config.prompts, config.samples, generator),
        vocab_size=_FIRST_TOPIC + config.topics + config.content_tokens,
        pad_token_id=PAD,
        shortcut_name="filler tokens",
        facts=data_facts({"train": train, "test": test, "shifted": shifted}),
        gold=reward.of_sequences,
        prompts=Sequences.from_lists([[_FIRST_TOPIC + t, SEPARATOR] for t in range(config.topics)], PAD),
        end_token_id=END,
        regime_of=reward.regime_of,
        regimes=tuple(REGIMES)[: config.instruction_regimes],
        shortcut_of=lambda sequences: (sequences.tokens == FILLER).sum(1).double(),
        unlabelled=lambda count, seed: _unlabelled(reward, count, seed),
    )


def _answers(
    reward: GoldReward, topic: torch.Tensor, filler: torch.Tensor, generator: torch.Generator, width: int
) -> _Answers:
    """Random answers with the given topics and amounts of filler, strewn in at random places; tokens [N, width]."""
    config, count = reward.config, len(topic)
    sizes = torch.randint(config.min_content, config.max_content + 1, (count,), generator=generator)
    content = reward.content(topic, generator)
    live = torch.arange(config.max_content) < sizes[:, None]

    body_lengths = sizes + filler
    inside = torch.arange(width - _FRAME) < body_lengths[:, None]
    keys = torch.rand(inside.shape, generator=generator).masked_fill(~inside, 2.0)
    is_filler = keys.argsort(1).argsort(1) < filler[:, None]
    rank = ((~is_filler).cumsum(1) - 1).clamp(0, config.max_content - 1)
    body = torch.where(is_filler, FILLER, content.gather(1, rank) + _FIRST_TOPIC + config.topics)

    tokens = torch.full((count, width), PAD)
    tokens[:, 0], tokens[:, 1] = topic + _FIRST_TOPIC, SEPARATOR
    tokens[:, 2:-1] = body.masked_fill(~inside, PAD)
    tokens[torch.arange(count), body_lengths + 2] = END
    return _Answers(tokens, body_lengths + _FRAME, reward(topic, content, live, filler), filler)


def _pairs(
    reward: GoldReward, count: int, shortcut_share: float, label_noise: float, generator: torch.Generator
) -> PreferencePairs:
    """Pairs of which exactly `shortcut_share` (rounded) have more filler in the answer that gold prefers."""
    config = reward.config
    more = round(count * shortcut_share)
    width = config.max_content + config.max_train_filler + _FRAME
    columns: list[list[torch.Tensor]] = [[], [], [], []]  # tokens and lengths of the better, then of the worse answer
    for agrees, need in ((True, more), (False, count - more)):
        while need > 0:
            topic = torch.randint(config.topics, (count,), generator=generator)
            filler = torch.randint(config.max_train_filler + 1, (2, count), generator=generator)
            first, second = (_answers(reward, topic, f, generator, width) for f in filler)
            first_better = first.gold > second.gold
            usable = (first.gold - second.gold).abs() >= config.min_margin
            usable &= torch.where(first_better == agrees, first.filler > second.filler, first.filler < second.filler)
            row = usable.nonzero().squeeze(1)[:need]
            need -= len(row)
            swap = ~first_better[row]
            for column, one, other in zip(
                columns,
                (first.tokens, first.lengths, second.tokens, second.lengths),
                (second.tokens, second.lengths, first.tokens, first.lengths),
                strict=True,
            ):
                column.append(_where(swap, other[row], one[row]))
    order = torch.randperm(count, generator=generator)
    better_tokens, better_lengths, worse_tokens, worse_lengths = (torch.cat(column)[order] for column in columns)
    flip = torch.randperm(count, generator=generator) < round(count * label_noise)
    chosen = Sequences(_where(flip, worse_tokens, better_tokens), _where(flip, worse_lengths, better_lengths), PAD)
    rejected = Sequences(_where(flip, better_tokens, worse_tokens), _where(flip, better_lengths, worse_lengths), PAD)
    return PreferencePairs(chosen, rejected, more / count, int(flip.sum()) / count)


def _where(condition: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.view(-1, *[1] * (yes.dim() - 1)), yes, no)


def policy_samples(reward: GoldReward, prompts: int, samples: int, generator: torch.Generator) -> PolicySamples:
    """Answers of the policy, whose filler has a geometric tail."""
    config = reward.config
    shape = (prompts, samples)
    topic = (torch.arange(prompts) % config.topics)[:, None].expand(shape).reshape(-1)
    uniform = torch.rand(topic.shape, generator=generator, dtype=torch.float64)
    if config.policy_filler_rate > 0:
        filler = (uniform.log() / torch.tensor(config.policy_filler_rate).double().log()).floor().long()
    else:
        filler = torch.zeros_like(topic)
    filler = filler.clamp_max(config.most_filler)
    width = config.max_content + int(filler.max()) + _FRAME
    answers = _answers(reward, topic, filler, generator, width)
    return PolicySamples(
        Sequences(answers.tokens, answers.lengths, PAD), answers.gold.view(shape), filler.double().view(shape)
    )


def _unlabelled(reward: GoldReward, count: int, seed: int) -> Sequences:
    """Answers of the policy, one to a prompt, the prompts in turn."""
    return policy_samples(reward, count, 1, torch.Generator().manual_seed(seed)).sequences
