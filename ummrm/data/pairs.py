"""From a row to a preference pair: columns found, texts or conversations checked, the better answer told by scores.

A row that makes no pair raises `RowProblem`, which says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import PairSource
from .rows import Place, RowProblem
from .texts import Text, text_or_messages, turns_of


@dataclass(frozen=True)
class Pair:
    """A sound pair.

    Attributes:
        prompt: text or messages; None where it is not told from the answers, which then begin with it.
        chosen: the better answer; messages where the prompt is.
        rejected: the other one.
        margin: by how much the first one is better, 0 or more; None where the data says nothing.
        place: where it stands.
    """

    prompt: Text | None
    chosen: Text
    rejected: Text
    margin: float | None
    place: Place

    @property
    def is_conversation(self) -> bool:
        """Whether texts are messages."""
        return not isinstance(self.chosen, str)

    @property
    def key(self) -> str:
        """What is the same of pairs with the same prompt."""
        if self.prompt:
            return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)
        if isinstance(self.chosen, str) and isinstance(self.rejected, str):
            shared = 0
            for one, other in zip(self.chosen, self.rejected, strict=False):
                if one != other:
                    break
                shared += 1
            return self.chosen[:shared]
        return ""

    @property
    def content(self) -> tuple[str, str]:
        """Both texts in full, as one can compare them."""
        one, other = (json.dumps([self.prompt, answer]) for answer in (self.chosen, self.rejected))
        return one, other


def pair_of(row: Mapping[str, Any], source: PairSource, place: Place) -> Pair:
    """The pair in a row.

    Raises:
        RowProblem: there is none.
    """
    margin = _margin(row, source)
    if source.answers is not None and source.scores is not None:
        chosen, rejected = _by_score(row, source.answers, source.scores)
    else:
        chosen, rejected = (_found(row, source.column(part), part) for part in ("chosen", "rejected"))
    given = _at(row, source.column("prompt"))
    if given is None and "prompt" in source.columns:
        _found(row, source.columns["prompt"], "prompt")  # asked for by name: missing is a problem
    prompt = None if given is None else text_or_messages(given, "prompt")
    chosen, rejected = text_or_messages(chosen, "chosen"), text_or_messages(rejected, "rejected")
    if source.turns is not None:
        prompt = None if prompt is None else turns_of(prompt, source.turns, "prompt")
        chosen, rejected = turns_of(chosen, source.turns, "chosen"), turns_of(rejected, source.turns, "rejected")
    elif source.as_messages and isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            raise RowProblem("malformed", "needs a `prompt` of text to become messages, as `as_messages` asks")
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("malformed", "chosen and rejected must both be text or both be messages")
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected)
    elif isinstance(prompt, list):
        raise RowProblem("malformed", "the prompt is messages and the answers are text")
    _check_answers(chosen, rejected)
    return Pair(prompt, chosen, rejected, margin, place)


# ---- columns -----------------------------------------------------------------------------------------------------


def _at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field of one; None without it."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _found(row: Mapping[str, Any], column: str, part: str) -> Any:
    value = _at(row, column)
    if value is None and column in row and part in ("chosen", "rejected", "answer"):
        raise RowProblem("empty", f"{part} is empty")
    if value is None:
        named = f"column {column!r}" + (f" ({part})" if column != part else "")
        has = ", ".join(str(name) for name in list(row)[:12]) or "none"
        raise RowProblem("malformed", f"no {named}; it has {has}; `columns` names others")
    return value


def _number(row: Mapping[str, Any], column: str, part: str) -> float:
    value = _found(row, column, part)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowProblem("malformed", f"{part} must be a number, got {value!r:.40}") from None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RowProblem("malformed", f"{part} must be a finite number, got {value!r:.40}")
    return float(value)


def _margin(row: Mapping[str, Any], source: PairSource) -> float | None:
    column = source.column("margin")
    if _at(row, column) is None and "margin" not in source.columns:
        return None
    margin = _number(row, column, "margin")
    if margin < 0:
        raise RowProblem("malformed", f"margin must be 0 or more, since chosen is the better one, got {margin:g}")
    return margin


def _by_score(row: Mapping[str, Any], answers: tuple[str, str], scores: tuple[str, str]) -> tuple[Any, Any]:
    first, second = (_number(row, column, f"score {column!r}") for column in scores)
    texts = [_found(row, column, "answer") for column in answers]
    if first == second:
        raise RowProblem("tied", f"both answers have the score {first:g}")
    return (texts[0], texts[1]) if first > second else (texts[1], texts[0])


# ---- texts and conversations -------------------------------------------------------------------------------------


def _conversation(
    prompt: Text | None, chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Prompt and answers apart: what both conversations begin with, and how each ends."""
    if isinstance(prompt, str):
        opened = [one[0]["role"] == "assistant" for one in (chosen, rejected) if one]
        if opened and all(opened):
            prompt = [{"role": "user", "content": prompt}]
        elif any(opened):
            raise RowProblem("malformed", "one answer begins with the assistant's message, the other one does not")
        else:  # both hold it, as whole conversations do
            if not any(message["content"].strip() == prompt.strip() for message in chosen[:2]):
                raise RowProblem("malformed", "the prompt is text, and the conversations do not begin with it")
            prompt = None
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen == rejected:
        raise RowProblem("identical", "chosen and rejected are the same")
    before = [*(prompt or []), *chosen[:shared]]
    return before, chosen[shared:], rejected[shared:]


def _check_answers(chosen: Text, rejected: Text) -> None:
    for part, answer in (("chosen", chosen), ("rejected", rejected)):
        empty = not answer.strip() if isinstance(answer, str) else not any(m["content"].strip() for m in answer)
        if empty:
            raise RowProblem("empty", f"{part} is empty")
    if chosen == rejected:
        raise RowProblem("identical", "chosen and rejected are the same")
