"""`ummrm evaluate`: what reward models are worth on pairs and benchmarks, as JSON and one page."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import pairs, rewards
from .errors import UserError, blaming
from .outputs import check_report_folder
from .screen import Steps, note, quiet_libraries, say, size
from .source import Source

if TYPE_CHECKING:
    from ..data.config import PairSource
    from ..evaluation.reading import Candidates, EvaluationData
    from ..evaluation.scoring import RewardScorer

_FILES = ("evaluation.json", "report.html")
_NEEDS = ("datasets", "scipy", "matplotlib", "jinja2")
_DATA, _PARTS = "The data", "What is measured"


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or hub names of reward models.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="PAIRS",
            help="Pairs: a file (.jsonl, .json, .csv, .parquet), a folder, a pattern or a hub name; may be given "
            "several times. RewardBench 1 and 2 are known by their columns.",
            rich_help_panel=_DATA,
        ),
    ],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder for evaluation.json and report.html.")],
    subset: Annotated[
        str | None,
        typer.Option(
            help="Column that names a pair's subset (default: subset, where there is one).",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    columns: pairs.Columns = None,
    split: pairs.Split = None,
    answers: pairs.Answers = None,
    scores: pairs.Scores = None,
    turns: pairs.Turns = None,
    as_messages: pairs.AsMessages = False,
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="pairs, rewardbench or rewardbench2 (default: by the columns).",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    strict: pairs.Strict = False,
    probes: Annotated[
        str,
        typer.Option(
            help="Shortcut probes: all, none, or some of length, repetition, list, bold, opening, praise, neutral.",
            rich_help_panel=_PARTS,
        ),
    ] = "all",
    probe_pairs: Annotated[
        int, typer.Option(help="Make the edits of probes on at most so many pairs.", rich_help_panel=_PARTS)
    ] = 500,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS",
            help="For best-of-n: rows with prompt, candidates (texts) and, without --gold, gold (their rewards).",
            show_default=False,
            rich_help_panel=_PARTS,
        ),
    ] = None,
    gold: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The reward model whose rewards count as true.",
            show_default=False,
            rich_help_panel=_PARTS,
        ),
    ] = None,
    too_long: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="Pairs with a text over a model's limit: cut or drop.", rich_help_panel=_PARTS
        ),
    ] = "cut",
    seed: Annotated[int, typer.Option(help="Seed of what is drawn, from 0.", rich_help_panel=_PARTS)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
    batch_size: rewards.BatchSize = 16,
    max_length: rewards.MaxLength = None,
    device: rewards.Device = "cpu",
    dtype: rewards.Dtype = None,
    revision: rewards.Revision = None,
    trust_remote_code: rewards.TrustRemoteCode = False,
) -> None:
    """Evaluates reward models, ummrm's or any other, on the same data.

    Accuracy by subset, scores of RewardBench, calibration, shortcut probes,
    agreement of several models, best-of-n against a gold model: each with its
    interval. docs/evaluation.md says what a number means.

    Example: ummrm evaluate merged --data pairs.jsonl --output report
    """
    rewards.check_scoring(batch_size, max_length, device, dtype)
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"`ummrm evaluate` needs {', '.join(missing)}; run: pip install 'ummrm[run]'")
    if revision is not None and len(models) + (gold is not None) > 1:
        raise UserError("--revision must be left out for several models; give each as a folder.")
    if gold is not None and candidates is None:
        raise UserError("--gold must come with --candidates, the answers that it judges.")
    target = check_report_folder(output, _FILES, overwrite)
    with quiet_libraries():
        from ..evaluation.edits import NAMES
        from ..evaluation.runner import EvaluationConfig

        names = {"all": NAMES, "none": ()}.get(probes) or tuple(
            part.strip() for part in probes.split(",") if part.strip()
        )
        names = () if probes == "none" else names
        with blaming("", ValueError):
            config = EvaluationConfig(too_long=too_long, probes=names, probe_pairs=probe_pairs, seed=seed)
        several: dict[str, Any] = {"columns": columns, "split": split, "answers": answers, "scores": scores}
        shared: dict[str, Any] = {"turns": turns, "as_messages": as_messages}
        sources = [pairs.source_of(path, pairs.fields_of(**several, **shared)) for path in data]
        listed = None if candidates is None else pairs.source_of(candidates, pairs.fields_of(**shared))

        def found(name: str) -> Source:
            return rewards.open_reward_model(name, revision=revision, trust_remote_code=trust_remote_code)

        judged = _named([found(name) for name in models])
        judge = None if gold is None else found(gold)
        steps = Steps(2 + len(judged) + (judge is not None))
        with steps.step("reading the data"):
            read, held = _read(sources, listed, subset, data_format, strict, gold_model=judge is not None)
        for line in read.lines() + ([] if held is None else held.lines()):
            note(line)
        flatten = all(pair.benchmark != "pairs" for pair in read.pairs)
        if any(pair.benchmark == "pairs" and not isinstance(pair.chosen, str) for pair in read.pairs):
            _check_templates([*judged.values()], trust_remote_code)
        if held is not None and any(not isinstance(text, str) for texts in held.texts for text in texts):
            _check_templates([*judged.values(), *([] if judge is None else [judge])], trust_remote_code)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        options |= {"batch_size": batch_size, "max_length": max_length, "flatten": flatten}

        def loader(name: str, source: Source) -> Callable[[], RewardScorer]:
            return lambda: rewards.load_scorer(source, name=name, **options)

        def progress(name: str) -> str:
            with steps.step(f"scoring with {name}", own_bar=True):
                return name

        from ..evaluation.report import summary, write_report
        from ..evaluation.runner import evaluate as run

        with blaming("", ValueError, TypeError):
            result = run(
                {name: loader(name, source) for name, source in judged.items()},
                read,
                config,
                candidates=held,
                gold=None if judge is None else loader(judge.name, judge),
                progress=progress,
            )
        with steps.step(f"writing {output}"), blaming(f"{output} can't be written", OSError):
            files = write_report(result, target)
    for line in summary(result):
        say(line)
    for line in result.notes:
        note(f"note: {line}")
    say(f"{files[-1]} ({size(files[-1].stat().st_size)})")


def _read(
    sources: list[PairSource],
    answers: PairSource | None,
    subset: str | None,
    data_format: str | None,
    strict: bool,
    *,
    gold_model: bool,
) -> tuple[EvaluationData, Candidates | None]:
    from ..evaluation.reading import read_candidates, read_evaluation_data

    with blaming("", ValueError):
        read = read_evaluation_data(sources, subset=subset, form=data_format, strict=strict)
        return read, None if answers is None else read_candidates(answers, gold_model=gold_model)


def _named(sources: list[Source]) -> dict[str, Source]:
    """Models by the last part of their names, or by all of it where two share that."""
    short = [Path(source.name).name or source.name for source in sources]
    named = {one if short.count(one) == 1 else source.name: source for one, source in zip(short, sources, strict=True)}
    if len(named) < len(sources):
        raise UserError("MODELS must be different ones, and one is given twice; leave it out.")
    return named


def _check_templates(sources: list[Source], trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    for source in sources:
        with blaming(f"{source.name}: its tokenizer can't be loaded", Exception):
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{source.name}: its tokenizer must have a chat template for conversations; give text, or set "
                "chat_template in its tokenizer_config.json."
            )
