"""`ummrm score`: rewards of the texts in a file or a pipe, in order, in bounded memory."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import pairs, rewards
from .errors import UserError, blaming
from .score_output import Output
from .scoring_processes import in_order, scoring
from .screen import note, quiet_libraries

if TYPE_CHECKING:
    from ..data.rows import Place, RowProblem
    from ..evaluation.scoring import RewardScorer
    from ..hf.texts import Text

_BATCHES = 64  # of a window: enough that its batches are of like lengths
_WINDOW_BYTES = 16 << 20
_TOGETHER, _TOGETHER_CHARACTERS = 256, 1 << 20  # texts that the tokenizer gets in one call, and about what they have


def score(
    model: Annotated[str, typer.Argument(help="Folder or hub name (organisation/model) of a reward model.")],
    file: Annotated[
        str,
        typer.Argument(
            help="JSON lines, .json, .csv, .tsv or .parquet, or text with --text; text may be .gz; -: standard input."
        ),
    ] = "-",
    text: Annotated[bool, typer.Option("--text", help="Every line is a text, not JSON.")] = False,
    turns: pairs.Turns = None,
    as_messages: pairs.AsMessages = False,
    members: Annotated[
        bool, typer.Option("--members", help="Of a mixture by sequence: every member's reward and their spread.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="A broken line or row gives null, and does not end the command.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rewards there; the same command goes on where it was cut off."),
    ] = None,
    num_processes: Annotated[
        int, typer.Option(help="Processes that score, each with the model; with --device cuda one a GPU.")
    ] = 1,
    batch_size: rewards.BatchSize = 16,
    max_length: rewards.MaxLength = None,
    device: rewards.Device = "cpu",
    dtype: rewards.Dtype = None,
    revision: rewards.Revision = None,
    trust_remote_code: rewards.TrustRemoteCode = False,
) -> None:
    """Scores texts with a reward model: a line of JSON out for every line or row in, in order.

    A row has `text`, `prompt` and `response`, or `messages`. The output has
    `line` (the number of its line or row), `reward`, with --members `members` (their rewards) and `spread`
    (their standard deviation), and `cut` where a text was too long and was cut.
    Blank lines of JSON are passed over.

    Example: ummrm score merged answers.jsonl > rewards.jsonl

    Example: ummrm score merged answers.jsonl --out rewards.jsonl --num-processes 2
    """
    rewards.check_scoring(batch_size, max_length, device, dtype)
    if file != "-" and not os.path.isfile(file):
        raise UserError(f"FILE must be a file, and {file!r} {'is none' if os.path.exists(file) else 'is not there'}.")
    if num_processes < 1:
        raise UserError(f"`--num-processes` must be at least 1, got {num_processes}.")
    if turns is not None and as_messages:
        raise UserError("--as-messages must be left out with --turns, which make messages; leave one of them out.")
    with quiet_libraries():
        source = rewards.open_reward_model(model, revision=revision, trust_remote_code=trust_remote_code)
        how: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "max_length": max_length, "members": members}
        reading: dict[str, Any] = {"plain": text, "turns": pairs.read_turns(turns), "as_messages": as_messages}
        load = {**how, "device": device, "trust_remote_code": trust_remote_code}
        # of several processes this one makes tokens alone
        scorer = rewards.load_scorer(source, **{**load, "device": device if num_processes == 1 else "cpu"})
        output = Output(
            out, {"model": _facts(Path(source.folder)), "file": file, "keep_going": keep_going, **how, **reading}
        )
        try:
            with output, scoring(scorer, num_processes, {"source": source.folder, **load}) as start:
                ahead = 0 if num_processes == 1 else 2 * num_processes
                _run(scorer, start, ahead, file, output, keep_going=keep_going, **reading)
        except BrokenPipeError:  # whoever read the rewards has enough of them
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts(folder: Path) -> list[list[Any]]:
    """Which model it is: its files with their sizes and times."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@dataclass
class _Line:
    """A line of the input.

    Attributes:
        place: where it stands.
        ids: tokens of its text.
        problem: why it has none.
    """

    place: Place
    ids: list[int]
    problem: str = ""


def _run(
    scorer: RewardScorer,
    start: Callable[[list[list[int]]], Any],
    ahead: int,
    file: str,
    output: Output,
    *,
    plain: bool,
    keep_going: bool,
    **reading: Any,
) -> None:
    begin, done, cut, broken = time.perf_counter(), 0, 0, 0

    def sound_lines(window: list[_Line]) -> list[_Line]:
        bad = next((i for i, line in enumerate(window) if line.problem), None)
        kept = window if keep_going or bad is None else window[:bad]
        return [line for line in kept if not line.problem]

    texts = output.rest(_texts(file, plain, **reading))
    scored = in_order(_windows(scorer, texts), lambda w: start([line.ids for line in sound_lines(w)]), ahead)
    for window, found in scored:
        bad = next((i for i, line in enumerate(window) if line.problem), None)
        kept, sound = window if keep_going or bad is None else window[:bad], sound_lines(window)
        answers = {}
        for i, line in enumerate(sound):
            reward = float(found.rewards[i])
            if not math.isfinite(reward):
                line.problem = f"the model's reward is {reward}; score with another --dtype"
                continue
            number = line.place.number
            answers[number] = answer = {"line": number, "reward": reward}
            if found.members is not None and found.spread is not None:
                answer["members"] = found.members[i].tolist()
                answer["spread"] = float(found.spread[i])
            if found.cut[i]:
                answer["cut"] = True
                cut += 1
        for line in kept if keep_going or bad is None else window[: bad + 1]:
            if line.problem and not keep_going:
                output.flush()
                raise UserError(f"{line.place}: {line.problem}; mend the line, or give --keep-going.")
            broken += bool(line.problem)
            done += not line.problem
            number = line.place.number
            output.write(json.dumps(answers.get(number, {"line": number, "reward": None})))
        output.flush()
    seconds = time.perf_counter() - begin
    note(f"{done:,} texts in {seconds:.3g} s" + (f" ({done / seconds:.3g} a second)" if seconds > 0 else ""))
    if cut:
        note(f"warning: {cut:,} texts are longer than {scorer.max_length:,} tokens and were cut there.", "yellow")
    if broken:
        note(f"warning: {broken:,} lines are broken and got null.", "yellow")


def _windows(scorer: RewardScorer, texts: Iterable[tuple[Place, Text | RowProblem]]) -> Iterator[list[_Line]]:
    """Lines in parts that fit in memory."""
    window: list[_Line] = []
    held = 0
    for line in _lines(scorer, texts):
        window.append(line)
        held += 8 * len(line.ids)
        if len(window) >= _BATCHES * scorer.batch_size or held >= _WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def _lines(scorer: RewardScorer, texts: Iterable[tuple[Place, Text | RowProblem]]) -> Iterator[_Line]:
    """Every text with its tokens, made of several in one call."""
    together: list[tuple[Place, Text | RowProblem]] = []
    characters = 0
    for place, text in texts:
        together.append((place, text))
        characters += len(text) if isinstance(text, str) else 0
        if len(together) == _TOGETHER or characters >= _TOGETHER_CHARACTERS:
            yield from _tokenised(scorer, together)
            together, characters = [], 0
    yield from _tokenised(scorer, together)


def _tokenised(scorer: RewardScorer, texts: list[tuple[Place, Text | RowProblem]]) -> Iterator[_Line]:
    strings = {i: text for i, (_, text) in enumerate(texts) if isinstance(text, str)}
    made: dict[int, list[int]] = {}
    with contextlib.suppress(ValueError):  # of one of them; each alone then says what is wrong with it
        made = dict(zip(strings, scorer.tokens_of_many(list(strings.values())), strict=True))
    for i, (place, text) in enumerate(texts):
        line = _Line(place, [])
        try:
            if isinstance(text, Exception):
                raise text
            line.ids = made[i] if i in made else scorer.tokens(text)
            if not line.ids:
                raise ValueError("its text has no tokens")
        except ValueError as error:
            line.problem = " ".join(str(error).split()).rstrip(".")[:300]
        yield line


def _texts(file: str, plain: bool, **reading: Any) -> Iterator[tuple[Place, Text | RowProblem]]:
    """The text of every line or row, or why it has none."""
    from ..data.config import DataError, PairSource
    from ..data.rows import Place, RowProblem, is_table, json_lines, lines_of, opened, rows_of
    from ..evaluation.texts import text_of_line, text_of_row

    name = "standard input" if file == "-" else file
    with contextlib.ExitStack() as stack:
        stack.enter_context(blaming("", DataError))
        stack.enter_context(blaming(f"{name} can't be read", OSError, EOFError, remedy="mend the file."))
        stack.enter_context(blaming(f"{name} can't be read", ImportError, remedy="pip install 'ummrm[run]'."))
        if file != "-" and not plain and is_table(Path(file)):
            stream = None
            found: Iterable[tuple[Place, Any]] = rows_of(PairSource(glob.escape(file)))
        else:
            stream = sys.stdin.buffer if file == "-" else stack.enter_context(opened(Path(file)))
            found = json_lines(stream, name)
        if plain and stream is not None:
            found = ((Place(name, number), line) for number, line in lines_of(stream))
        for place, row in found:
            try:
                if isinstance(row, RowProblem):
                    raise row
                made = text_of_line(row, plain=True, turns=reading["turns"]) if plain else text_of_row(row, **reading)
            except RowProblem as problem:
                yield place, problem
            else:
                yield place, made
