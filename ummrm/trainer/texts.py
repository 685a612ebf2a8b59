"""Texts without labels, ready for distillation: tokens of rows in any format, scores that came along, batches.

What a row's texts are is stated in `hf/texts.py`; who scores them, elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf.texts import TEXT_FORMATS, texts_of, token_ids

GIVEN = "teacher_score"  # a column of scores that are there already; of a pair, with the answer's name before it


@dataclass
class TextCollator:
    """Texts as one batch, padded on the right, with their targets fp32 [N].

    Attributes:
        pad_token_id: what they are padded with.
        pad_to_multiple_of: of the batch's length.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        length = -(-longest // multiple) * multiple
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        targets = torch.tensor([row["target"] for row in rows], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "target": targets}


def tokens_of_rows(rows: dict[str, list], tokenizer, others: list[tuple[str, Any]]) -> dict[str, list]:
    """The texts of a batch of rows, a row each, for `datasets.Dataset.map`.

    Args:
        rows: column name to values.
        tokenizer: the student's.
        others: name and tokenizer of each teacher that reads other tokens.

    Returns:
        `input_ids`; `teacher_ids`, one list of tokens for each of `others`, if there are any; `given`, the scores of
        each text, where the rows have some.

    Raises:
        ValueError: a row without texts, with tokens where `others` need text, or without a score where one has some.
    """
    out: dict[str, list] = {"input_ids": []} | ({"teacher_ids": []} if others else {})
    for i in range(len(next(iter(rows.values())))):
        row = {key: values[i] for key, values in rows.items()}
        tokenised = next((k for k in (("input_ids",), ("chosen_ids", "rejected_ids")) if set(k) <= set(row)), None)
        if tokenised is not None:
            if others:
                raise ValueError(
                    f"the data must be text where a teacher has a tokenizer of its own, as {others[0][0]} has, got "
                    f"tokens; give {TEXT_FORMATS}."
                )
            out["input_ids"] += [row[key] for key in tokenised]
        else:
            texts = texts_of(row)
            out["input_ids"] += [token_ids(tokenizer, text, row) for text in texts]
            if others:
                out["teacher_ids"] += [[token_ids(other, text, row) for _, other in others] for text in texts]
        names = [name for name in (GIVEN, f"chosen_{GIVEN}", f"rejected_{GIVEN}") if row.get(name) is not None]
        if names:
            scores = [row[name] for name in names]
            out.setdefault("given", []).extend(list(s) if isinstance(s, (list, tuple)) else [s] for s in scores)
        if "given" in out and len(out["given"]) != len(out["input_ids"]):
            raise ValueError(
                f"every text must have a score where one has: `{GIVEN}` of a text, `chosen_{GIVEN}` and "
                f"`rejected_{GIVEN}` of a pair, got {', '.join(names) or 'none'} in row {i}."
            )
    return out


def given_scores(scores: list[list[float]], name: str) -> Tensor:
    """Scores that came with a set's texts, fp64 [N, members].

    Raises:
        ValueError: rows of different widths, or a score that is not finite.
    """
    widths = {len(row) for row in scores}
    if len(widths) != 1:
        raise ValueError(f"`{GIVEN}` must have equally many numbers in each row of the {name} set, got {widths}.")
    found = torch.tensor(scores, dtype=torch.float64)
    bad = (~found.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"`{GIVEN}` must be finite, and is NaN or infinite for {len(bad)} of {len(scores)} texts of the {name} "
            f"set, first text {bad[0]}; leave those texts out."
        )
    return found
