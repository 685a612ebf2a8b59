"""`ummrm score`: rewards of the texts in a file or a pipe, in order, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from . import rewards
from .errors import UserError
from .screen import note, quiet_libraries

if TYPE_CHECKING:
    from ..evaluation.scoring import RewardScorer

_BATCHES = 64  # of a window: enough that its batches are of like lengths
_WINDOW_BYTES = 16 << 20
_LONGEST_LINE = 64 << 20


def score(
    model: Annotated[str, typer.Argument(help="Folder or hub name (organisation/model) of a reward model.")],
    file: Annotated[str, typer.Argument(help="JSON lines, or text with --text; may be .gz; -: standard input.")] = "-",
    text: Annotated[bool, typer.Option("--text", help="Every line is a text, not JSON.")] = False,
    as_messages: Annotated[
        bool,
        typer.Option("--as-messages", help="Make messages of prompts and responses, for the chat template."),
    ] = False,
    members: Annotated[
        bool, typer.Option("--members", help="Of a mixture by sequence: every member's reward and their spread.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="A broken line gives null, and does not end the command.")
    ] = False,
    batch_size: rewards.BatchSize = 16,
    max_length: rewards.MaxLength = None,
    device: rewards.Device = "cpu",
    dtype: rewards.Dtype = None,
    revision: rewards.Revision = None,
    trust_remote_code: rewards.TrustRemoteCode = False,
) -> None:
    """Scores texts with a reward model: a line of JSON out for every line in, in order.

    A line has `text`, `prompt` and `response`, or `messages`. The output has
    `line`, `reward`, with --members `members` (their rewards) and `spread`
    (their standard deviation), and `cut` where a text was too long and was cut.
    Blank lines of JSON are passed over.

    Example: ummrm score merged answers.jsonl > rewards.jsonl
    """
    rewards.check_scoring(batch_size, max_length, device, dtype)
    if file != "-" and not os.path.isfile(file):
        raise UserError(f"FILE must be a file, and {file!r} {'is none' if os.path.exists(file) else 'is not there'}.")
    with quiet_libraries():
        source = rewards.open_reward_model(model, revision=revision, trust_remote_code=trust_remote_code)
        scorer = rewards.load_scorer(
            source,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            batch_size=batch_size,
            max_length=max_length,
            members=members,
        )
        try:
            _run(scorer, file, plain=text, as_messages=as_messages, keep_going=keep_going)
        except BrokenPipeError:  # whoever read the rewards has enough of them
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass
class _Line:
    """A line of the input.

    Attributes:
        number: from 1.
        ids: tokens of its text.
        problem: why it has none.
    """

    number: int
    ids: list[int]
    problem: str = ""


def _run(scorer: RewardScorer, file: str, *, plain: bool, as_messages: bool, keep_going: bool) -> None:
    name = "standard input" if file == "-" else file
    begin, done, cut, broken = time.perf_counter(), 0, 0, 0
    for window in _windows(scorer, file, plain, as_messages):
        bad = next((i for i, line in enumerate(window) if line.problem), None)
        kept = window if keep_going or bad is None else window[:bad]
        sound = [line for line in kept if not line.problem]
        found = scorer.score_tokens([line.ids for line in sound])
        answers = {}
        for i, line in enumerate(sound):
            reward = float(found.rewards[i])
            if not math.isfinite(reward):
                line.problem = f"the model's reward is {reward}; score with another --dtype"
                continue
            answers[line.number] = answer = {"line": line.number, "reward": reward}
            if found.members is not None and found.spread is not None:
                answer["members"] = found.members[i].tolist()
                answer["spread"] = float(found.spread[i])
            if found.cut[i]:
                answer["cut"] = True
                cut += 1
        for line in kept if keep_going or bad is None else window[: bad + 1]:
            if line.problem and not keep_going:
                sys.stdout.flush()
                raise UserError(f"{name}:{line.number}: {line.problem}; mend the line, or give --keep-going.")
            broken += bool(line.problem)
            done += not line.problem
            print(json.dumps(answers.get(line.number, {"line": line.number, "reward": None})))
        sys.stdout.flush()
    seconds = time.perf_counter() - begin
    note(f"{done:,} texts in {seconds:.3g} s" + (f" ({done / seconds:.3g} a second)" if seconds > 0 else ""))
    if cut:
        note(f"warning: {cut:,} texts are longer than {scorer.max_length:,} tokens and were cut there.", "yellow")
    if broken:
        note(f"warning: {broken:,} lines are broken and got null.", "yellow")


def _windows(scorer: RewardScorer, file: str, plain: bool, as_messages: bool) -> Iterator[list[_Line]]:
    """Lines in parts that fit in memory."""
    from ..evaluation.texts import text_of_line

    window: list[_Line] = []
    held = 0
    with _opened(file) as stream:
        for number, raw in _lines(stream, file):
            if raw is not None and not plain and not raw.strip():
                continue
            line = _Line(number, [])
            try:
                if raw is None:
                    raise ValueError(f"longer than {_LONGEST_LINE >> 20} MB")
                line.ids = scorer.tokens(text_of_line(raw, plain=plain, as_messages=as_messages))
                if not line.ids:
                    raise ValueError("its text has no tokens")
            except ValueError as error:
                line.problem = " ".join(str(error).split()).rstrip(".")[:300]
            window.append(line)
            held += len(raw or b"")
            if len(window) >= _BATCHES * scorer.batch_size or held >= _WINDOW_BYTES:
                yield window
                window, held = [], 0
    if window:
        yield window


def _lines(stream: BinaryIO, file: str) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None for one that is too long to be held."""
    number = 0
    while True:
        try:
            raw = stream.readline(_LONGEST_LINE + 1)
            number += 1
            whole: bytes | None = raw
            while len(raw) > _LONGEST_LINE and not raw.endswith(b"\n"):
                whole, raw = None, stream.readline(_LONGEST_LINE + 1)
        except (OSError, EOFError) as error:
            raise UserError(f"{file}:{number + 1} can't be read: {error}; mend the file.") from error
        if whole == b"":
            return
        yield number, whole.removeprefix(b"\xef\xbb\xbf") if whole is not None and number == 1 else whole


def _opened(file: str) -> Any:
    if file == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return gzip.open(file, "rb") if Path(file).suffix == ".gz" else open(file, "rb")
