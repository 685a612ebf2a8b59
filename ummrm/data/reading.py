"""Reads preference pairs from several sources, counts what makes none, and splits held-out pairs off by prompt.

The result is in the form that TRL's RewardTrainer takes. Which rows there are is `rows.py`'s business, what a pair is
`pairs.py`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value

from .config import DataError, PairsConfig, PairSource
from .pairs import Pair, pair_of
from .report import DataReport, SourceReport, made_of
from .rows import RowProblem
from .texts import Text

Length = Callable[[Sequence[Text]], Sequence[int]]
"""Tokens of each text."""

_LEAST_PREFIX = 32  # characters of a prompt that is guessed from its answers' common beginning
_AT_ONCE = 1024  # texts that are measured together


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train on and to evaluate with.

    Attributes:
        train: columns `chosen` and `rejected`, `prompt` where every pair has one, `margin` where any does.
        held_out: the same.
        report: what was read and left out.
    """

    train: Dataset
    held_out: Dataset
    report: DataReport


def read_pairs(config: PairsConfig, *, length: Length | None = None, max_length: int | None = None) -> PreferenceData:
    """Reads, checks and splits the pairs of a configuration.

    Texts are strings, or conversations (lists of messages with role and content) in all pairs. A pair whose prompt
    stands in front of its answers is taken as it is; a conversation's prompt is what both answers begin with.

    Args:
        config: the sources.
        length: gives the tokens of each of several texts, prompt and answer together; with `max_length`.
        max_length: pairs with a longer text are counted and left out.

    Returns:
        The same pairs in the same order whenever files and configuration are the same.

    Raises:
        DataError: a source that can't be read or has no pair; under `strict` a row that makes none; texts in one
            source and conversations in another; pairs that can't be split by prompt.
    """
    report = DataReport(split=not config.held_out)
    train = [_read(source, report.train, length, max_length) for source in config.train]
    given = [_read(source, report.held_out, length, max_length) for source in config.held_out]
    if config.strict and report.left_out:
        lines = "\n".join(report.lines()[:-1])
        raise DataError(f"{report.left_out:,} rows make no pair, and `strict` is set; mend them or drop it:\n{lines}")
    _check_kinds([*zip(config.train, train, strict=True), *zip(config.held_out, given, strict=True)])
    everything = [pair for pairs in (*train, *given) for pair in pairs]
    counted = Counter(pair.content for pairs in train for pair in pairs)
    report.repeated = sum(count - 1 for count in counted.values())
    report.contradicting = sum(count for (one, other), count in counted.items() if (other, one) in counted)
    groups = _groups(everything)
    if config.held_out:
        held_out = [pair for pairs in given for pair in pairs]
        known = {groups[id(pair)] for pairs in train for pair in pairs}
        report.on_both_sides = sum(groups[id(pair)] in known for pair in held_out)
    else:
        apart = _split([pair for pairs in train for pair in pairs], groups, config)
        held_out = [pair for pairs in train for pair in pairs if groups[id(pair)] in apart]
        train = [[pair for pair in pairs if groups[id(pair)] not in apart] for pairs in train]
    weighted = [
        pair
        for source, pairs in zip(config.train, train, strict=True)
        for pair in pairs
        for _ in range(_copies(pair, source.weight, config.seed))
    ]
    report.train_pairs, report.held_out_pairs = len(weighted), len(held_out)
    if not weighted:
        raise DataError("the training pairs must not be none after weighting; give sources a larger weight.")
    with_prompt = all(pair.prompt is not None for pair in everything)
    with_margin = any(pair.margin is not None for pair in everything)
    ready = [_data_set(pairs, with_prompt, with_margin) for pairs in (weighted, held_out)]
    return PreferenceData(ready[0], ready[1], report)


def _read(source: PairSource, reports: list[SourceReport], length: Length | None, limit: int | None) -> list[Pair]:
    """The sound pairs of a source; what makes none is counted in a new report."""
    report = SourceReport(source.path)
    reports.append(report)
    wanted = "preference pairs"
    found = made_of(source, report, lambda row, place: pair_of(row, source, place), wanted)
    if limit is not None and length is not None:
        found = _short_enough(found, report, length, limit)
    if not found:
        raise report.nothing(wanted)
    return found


def _short_enough(pairs: list[Pair], report: SourceReport, length: Length, limit: int) -> list[Pair]:
    kept = []
    for start in range(0, len(pairs), _AT_ONCE // 2):
        part = pairs[start : start + _AT_ONCE // 2]
        lengths = list(length([_whole(pair.prompt, text) for pair in part for text in (pair.chosen, pair.rejected)]))
        for i, pair in enumerate(part):
            longest = max(lengths[2 * i : 2 * i + 2])
            if longest > limit:
                report.add(pair.place, RowProblem("long", f"{longest} tokens, at most {limit}"))
            else:
                kept.append(pair)
    return kept


def _whole(prompt: Text | None, answer: Text) -> Text:
    return answer if prompt is None else prompt + answer  # type: ignore[operator]  # of one kind, by `pair_of`


def _check_kinds(read: Sequence[tuple[PairSource, list[Pair]]]) -> None:
    first: dict[bool, Pair] = {}
    for _, pairs in read:
        for pair in pairs:
            first.setdefault(pair.is_conversation, pair)
    if len(first) == 2:
        raise DataError(
            f"pairs must all be text or all be conversations, and {first[False].place} is text, {first[True].place} a "
            "conversation; `turns` or `as_messages` of a source make conversations of its texts."
        )


# ---- held-out pairs ----------------------------------------------------------------------------------------------


def _groups(pairs: list[Pair]) -> dict[int, str]:
    """By `id` of each pair what is the same for pairs of one prompt.

    A prompt that isn't told from its answers is known by what both begin with, which may take in a word or two of them;
    so a beginning that itself begins with another's whole one is of the same prompt.
    """
    explicit = {id(pair): pair.key for pair in pairs if pair.prompt}
    guessed = sorted((pair.key, i) for i, pair in enumerate(pairs) if not pair.prompt)
    first = None
    for key, i in guessed:
        if first is None or len(first) < _LEAST_PREFIX or not key.startswith(first):
            first = key
        # without a beginning to speak of, every pair stands for itself
        explicit[id(pairs[i])] = first if len(first) >= _LEAST_PREFIX else f"{first}\0{pairs[i].content}"
    return explicit


def _split(pairs: list[Pair], groups: dict[int, str], config: PairsConfig) -> set[str]:
    """The groups that are held out: a share of the pairs, drawn by seed, whatever order the pairs stand in."""
    sizes = Counter(groups[id(pair)] for pair in pairs)
    if len(sizes) < 2:
        raise DataError(
            f"held-out pairs are split off by prompt, and all {len(pairs)} pairs have the same; give `held_out`."
        )
    wanted = max(1, min(round(config.held_out_share * len(pairs)), config.most_held_out))
    taken: set[str] = set()
    count = 0
    order = sorted(sizes, key=lambda group: _draw(group, config.seed))
    for group in order:
        if count + sizes[group] <= wanted and len(taken) + 1 < len(sizes):  # one is left to train on
            taken.add(group)
            count += sizes[group]
    return taken or {min(order, key=lambda group: sizes[group])}


def _copies(pair: Pair, weight: float, seed: int) -> int:
    """How often a pair stands in the training set."""
    whole, rest = divmod(weight, 1)
    return int(whole) + (rest > 0 and _draw(repr(pair.content) + str(pair.place), seed) < rest)


def _draw(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _data_set(pairs: list[Pair], with_prompt: bool, with_margin: bool) -> Dataset:
    messages = [{"role": Value("string"), "content": Value("string")}]
    kind: Any = messages if pairs[0].is_conversation else Value("string")
    columns: dict[str, Any] = {"prompt": kind} if with_prompt else {}
    columns |= {"chosen": kind, "rejected": kind} | ({"margin": Value("float64")} if with_margin else {})
    rows: dict[str, list] = {name: [] for name in columns}
    for pair in pairs:
        if with_prompt:
            rows["prompt"].append(pair.prompt)
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            rows[name].append(answer if with_prompt else _whole(pair.prompt, answer))
        if with_margin:
            rows["margin"].append(pair.margin or 0.0)
    return Dataset.from_dict(rows, features=Features(columns))
