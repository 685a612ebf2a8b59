"""Preference pairs from real English text: a passage against the same passage, mildly corrupted.

The text is the Python reference topics that the standard library carries (`pydoc_data.topics`), so that nothing is
downloaded; its wording differs between Python versions, and numbers with it. In most training pairs the preferred
answer is the longer one (the planted shortcut); a policy's answers are longer still and err at a rate per word.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .base import PolicySamples, PreferencePairs, Sequences, Task, data_facts

Tokenize = Callable[[list[str]], list[list[int]]]

_MARKUP = re.compile(r"::=|>>>|={3,}|-{3,}|\*{3,}|\S\s{2,}\S.*\S\s{2,}\S")
_PROSE_WORD = re.compile(r"\(?[A-Za-z][a-z]*[,.;:)]*")
_PROSE_SHARE = 0.85  # of a passage's words; below it the passage is mostly code or a table
_FEWEST_WORDS = 24


@dataclass(frozen=True)
class TextTaskConfig:
    """The real-text task.

    Attributes:
        train_pairs: training pairs.
        test_pairs: held-out pairs in each of the two test sets, from passages that training never saw.
        held_out_share: share of the passages kept for testing.
        min_words: fewest words of the longer answer of a pair.
        max_words: most.
        shorter_by: the shorter answer has at least this share fewer words.
        max_corruptions: a rejected answer has 1 to this many corruptions.
        label_noise: share of training pairs whose label is flipped.
        shortcut_share: share of pairs in which the better answer is the longer; one minus it in the shifted set.
        prompts: prompts (held-out passages) for best-of-n.
        samples: policy samples for each prompt.
        policy_mean_words: mean of the geometric number of words beyond `min_words` in a policy's answer.
        policy_error_rate: corruptions per word in a policy's answer.
        kind: tells tasks apart.
    """

    train_pairs: int = 1200
    test_pairs: int = 400
    held_out_share: float = 0.25
    min_words: int = 10
    max_words: int = 20
    shorter_by: float = 0.15
    max_corruptions: int = 2
    label_noise: float = 0.0
    shortcut_share: float = 0.75
    prompts: int = 8
    samples: int = 64
    policy_mean_words: float = 10.0
    policy_error_rate: float = 0.08
    kind: Literal["text"] = "text"

    def __post_init__(self) -> None:
        for name in ("train_pairs", "test_pairs", "max_corruptions", "prompts", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"TextTaskConfig: `{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("label_noise", "shortcut_share", "policy_error_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"TextTaskConfig: `{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("held_out_share", "shorter_by"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"TextTaskConfig: `{name}` must be strictly between 0 and 1, got {getattr(self, name)}."
                )
        if not 6 <= self.min_words <= self.max_words <= _FEWEST_WORDS:
            raise ValueError(
                f"TextTaskConfig: 6 <= min_words <= max_words <= {_FEWEST_WORDS} (a passage's fewest words) must hold, "
                f"got {self.min_words} and {self.max_words}."
            )
        if self.policy_mean_words <= 0:
            raise ValueError(f"TextTaskConfig: `policy_mean_words` must be above 0, got {self.policy_mean_words}.")


def english_passages() -> list[str]:
    """Paragraphs of English prose from the standard library's reference topics, markup removed, each once, in order."""
    from pydoc_data.topics import topics

    passages: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if _MARKUP.search(paragraph.strip()):
                continue
            words = re.sub(r"[*\"“”]|\[\d+\]", "", paragraph).split()
            prose = sum(_PROSE_WORD.fullmatch(word) is not None for word in words)
            if len(words) >= _FEWEST_WORDS and prose >= _PROSE_SHARE * len(words):
                passages[" ".join(words)] = None
    return list(passages)


def corrupt(words: list[str], count: int, rng: random.Random) -> list[str]:
    """Makes `count` mild errors: swaps neighbours, drops a word, repeats a short phrase, or puts a word elsewhere.

    Args:
        words: at least 4; not changed.
        count: errors to make; each changes the text, later ones may touch the same place.
        rng: chooses kinds and places.
    """
    words = list(words)
    for _ in range(count):
        before = list(words)
        while words == before:
            kind, i = rng.randrange(4), rng.randrange(len(words) - 1)
            if kind == 0:
                words[i], words[i + 1] = words[i + 1], words[i]
            elif kind == 1 and len(words) > 4:
                del words[i]
            elif kind == 2:
                phrase = words[i : i + rng.randint(1, 3)]
                words[i:i] = phrase
            elif kind == 3:
                words.insert(rng.randrange(len(words)), words.pop(i))
    return words


def make_text_task(config: TextTaskConfig, seed: int, tokenize: Tokenize, vocab_size: int, pad_token_id: int) -> Task:
    """Makes the task from the standard library's text.

    Args:
        config: sizes and strengths.
        seed: of the split, the windows and the corruptions.
        tokenize: texts to lists of token ids, special tokens included.
        vocab_size: the tokenizer's.
        pad_token_id: the tokenizer's.

    Returns:
        The task; gold is minus the number of corruptions.
    """
    rng = random.Random(seed)
    passages = [passage.split() for passage in english_passages()]
    rng.shuffle(passages)
    cut = round(len(passages) * config.held_out_share)
    held_out, training = passages[:cut], passages[cut:]
    longest_first = sorted(held_out, key=len, reverse=True)
    if len(longest_first) < config.prompts:
        raise ValueError(f"TextTaskConfig: `prompts` must be at most {len(held_out)} (held-out passages).")

    def pairs(source: list[list[str]], count: int, share: float, noise: float = 0.0) -> PreferencePairs:
        return _pairs(config, source, count, share, noise, rng, tokenize, pad_token_id)

    def unlabelled(count: int, seed: int) -> Sequences:
        once, own = dataclasses.replace(config, samples=1), random.Random(seed)
        return _policy_samples(once, own.choices(training, k=count), own, tokenize, pad_token_id).sequences

    train = pairs(training, config.train_pairs, config.shortcut_share, config.label_noise)
    test = pairs(held_out, config.test_pairs, config.shortcut_share)
    shifted = pairs(held_out, config.test_pairs, 1 - config.shortcut_share)
    return Task(
        name="English text",
        train=train,
        test=test,
        shifted=shifted,
        policy=_policy_samples(config, longest_first[: config.prompts], rng, tokenize, pad_token_id),
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        shortcut_name="words",
        facts={**data_facts({"train": train, "test": test, "shifted": shifted}), "passages": float(len(passages))},
        unlabelled=unlabelled,
    )


def _pairs(
    config: TextTaskConfig,
    passages: list[list[str]],
    count: int,
    shortcut_share: float,
    label_noise: float,
    rng: random.Random,
    tokenize: Tokenize,
    pad_token_id: int,
) -> PreferencePairs:
    longer_is_better = [i < round(count * shortcut_share) for i in range(count)]
    flipped = [i < round(count * label_noise) for i in range(count)]
    rng.shuffle(longer_is_better)
    rng.shuffle(flipped)
    texts: tuple[list[str], list[str]] = ([], [])
    for longer, flip in zip(longer_is_better, flipped, strict=True):
        better, worse = _pair(config, rng.choice(passages), longer, rng)
        for side, words in zip(texts, (worse, better) if flip else (better, worse), strict=True):
            side.append(" ".join(words))
    chosen, rejected = (Sequences.from_lists(tokenize(side), pad_token_id) for side in texts)
    return PreferencePairs(chosen, rejected, sum(longer_is_better) / count, sum(flipped) / count)


def _pair(
    config: TextTaskConfig, passage: list[str], longer_is_better: bool, rng: random.Random
) -> tuple[list[str], list[str]]:
    """(better, worse): two cuts of a passage from one start, the worse one corrupted; both may end in mid-sentence."""
    long = rng.randint(config.min_words, config.max_words)
    short = rng.randint(max(4, long // 2), int(long * (1 - config.shorter_by)))
    start = rng.randrange(len(passage) - long + 1)
    better, worse = (long, short) if longer_is_better else (short, long)
    errors = rng.randint(1, config.max_corruptions)
    while True:  # until the errors leave the order of the lengths as wanted
        corrupted = corrupt(passage[start : start + worse], errors, rng)
        if (better > len(corrupted)) == longer_is_better and better != len(corrupted):
            return passage[start : start + better], corrupted


def _policy_samples(
    config: TextTaskConfig, prompts: list[list[str]], rng: random.Random, tokenize: Tokenize, pad_token_id: int
) -> PolicySamples:
    texts, gold, length = [], [], []
    for passage in prompts:
        for _ in range(config.samples):
            words = config.min_words + int(rng.expovariate(1 / config.policy_mean_words))
            words = min(words, len(passage))
            errors = sum(rng.random() < config.policy_error_rate for _ in range(words))
            answer = corrupt(passage[:words], errors, rng)
            texts.append(" ".join(answer))
            gold.append(-errors)
            length.append(len(answer))
    shape = (len(prompts), config.samples)
    return PolicySamples(
        Sequences.from_lists(tokenize(texts), pad_token_id),
        torch.tensor(gold, dtype=torch.float64).view(shape),
        torch.tensor(length, dtype=torch.float64).view(shape),
    )
