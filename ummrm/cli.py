"""The command line: the demo, recipes, the laboratory, and thin commands over upcycle, merge and build_info.

Parses, calls the library, prints; an error of the user's is one line and a non-zero exit. Nothing imports this module.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import transformers
import typer
import yaml
from rich.console import Console
from transformers import AutoConfig

from . import MergeConfig, UpcycleConfig, __version__, _library, modeling, prepare_merge
from . import merge as merge_model
from . import upcycle as upcycle_model
from .lab import StudyError, load_study, report_lines, run_study, shipped_studies
from .lab import write_report as write_lab_report
from .lab.config import OPTIMISERS
from .recipe import (
    RecipeCheckError,
    ReloadError,
    load_recipe,
    raise_for_failed_checks,
    run_recipe,
    write_report,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

app = typer.Typer(
    name="ummrm",
    help="Upcycle a dense reward model into a mixture of experts, train it, merge it back into one dense model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
recipe_app = typer.Typer(help="Run a recipe: the whole job from data to report.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
lab_app = typer.Typer(help="The reward-hacking laboratory: studies over arms and seeds.", no_args_is_help=True)
app.add_typer(lab_app, name="lab")

# what a user's input can cause; anything else is a bug and shows its traceback
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, PermissionError)

OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for models, tables and plots.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")]


@app.command()
def demo(
    recipe: Annotated[Path, typer.Option(help="YAML file of the recipe.")] = Path("recipes/demo.yaml"),
    output: OutputFolder = Path("build/demo"),
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """The main job on a small task: dense, upcycle, train, merge, export, reload; a table and plots at the end.

    Exits with 1 if something does not come out as it must, and says which check failed.
    """
    _run(recipe, output, seed, quiet)


@recipe_app.command("run")
def recipe_run(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the recipe.")],
    output: OutputFolder = Path("build/recipe"),
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Runs a recipe from a YAML file."""
    _run(recipe, output, seed, quiet)


@lab_app.command("run")
def lab_run(
    study: Annotated[str, typer.Argument(help="YAML file of the study, or the name of one of ours (ummrm lab list).")],
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
    config = dataclasses.replace(load_study(study), **{name: v for name, v in given.items() if v is not None})
    run_study(config, output, _names(arms), _names(optimisers) or OPTIMISERS, progress=not quiet)
    lab_report(output)


@lab_app.command("report")
def lab_report(
    folder: Annotated[Path, typer.Argument(help="Folder that `ummrm lab run` wrote, or its tables alone.")],
) -> None:
    """Draws a study's plots and writes its report again, from its tables."""
    files = write_lab_report(folder)
    for line in report_lines(folder):
        _say(line)
    _say("written: " + ", ".join(str(path) for path in files))


@lab_app.command("list")
def lab_list() -> None:
    """Names the studies that come with this package."""
    for name, path in shipped_studies().items():
        first = path.read_text().partition("\n")[0].removeprefix("#").strip()
        _say(f"{name}: {first}")


@app.command()
def upcycle(
    dense: Annotated[str, typer.Argument(help="Folder (or hub name) of a dense Hugging Face model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the upcycled model.")],
    num_experts: Annotated[int, typer.Option(help="Routed experts, E.")] = 7,
    num_experts_per_tok: Annotated[int, typer.Option(help="Routed experts per token, K.")] = 5,
    num_shared_experts: Annotated[int, typer.Option(help="Shared experts, S.")] = 1,
    layers: Annotated[str, typer.Option(help='"all", a number n (every n-th), or indices such as 3,7,11.')] = "all",
    config: Annotated[Path | None, typer.Option(help="YAML file of further UpcycleConfig fields.")] = None,
    seed: Annotated[int, typer.Option(help="Of the routers' initialisation.")] = 0,
) -> None:
    """Upcycles a saved dense model into a mixture of experts that computes the same."""
    options = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "num_shared_experts": num_shared_experts,
        "layers": _layers(layers),
        **_yaml_mapping(config),
    }
    settings = UpcycleConfig.from_dict(options)
    torch.manual_seed(seed)
    model = upcycle_model(_load(dense, AutoConfig.from_pretrained(dense)), settings)
    model.save_pretrained(out)
    _copy_tokenizer(dense, out)
    _say(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, saved in {out}")


@app.command()
def merge(
    moe: Annotated[str, typer.Argument(help="Folder of an upcycled model, in its training or its merge phase.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged, dense model.")],
    shared_share: Annotated[
        float | None,
        typer.Option(help="lambda, for a model not yet in its merge phase; its merge weights are uniform."),
    ] = None,
) -> None:
    """Folds an upcycled model into one dense model of its original class, which needs no ummrm.

    A model saved in its merge phase brings its learned merge weights; one saved before gets uniform ones.
    """
    config = AutoConfig.from_pretrained(moe)
    phase = getattr(config, "umm_phase", None)
    if phase is None:
        raise ValueError(
            f"{moe} is no upcycled model (model_type {config.model_type!r}); run `ummrm upcycle` on it first."
        )
    if phase == "merging" and shared_share is not None:
        raise ValueError("--shared-share must be left out for a model in its merge phase: it has its own lambda.")
    model = _load(moe, config)
    if phase == "training":
        prepare_merge(model, MergeConfig() if shared_share is None else MergeConfig(shared_share=shared_share))
    dense = merge_model(model)
    dense.save_pretrained(out)
    _copy_tokenizer(moe, out)
    how = "learned" if phase == "merging" else "uniform"
    _say(f"{type(dense).__name__}, {how} merge weights, saved in {out}; stock transformers loads it")


@app.command()
def info() -> None:
    """Prints what the compiled extension was built with, which kernels it uses, and why it has none for CUDA."""
    record = {"ummrm": __version__, **_library.build_info(), "no_cuda_kernels": _library.no_cuda_kernels}
    print(json.dumps(record, indent=2, default=str))


def main() -> None:
    """Entry point: runs the command line and turns the user's errors into one line and exit status 2."""
    console = Console(stderr=True)
    try:
        app()
    except (RecipeCheckError, ReloadError, StudyError) as error:
        console.print(f"FAILED: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _run(recipe: Path, output: Path, seed: int | None, quiet: bool) -> None:
    config = load_recipe(recipe)
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    result = run_recipe(config, output, progress=not quiet)
    files = write_report(result, output, Console())
    _say("written: " + ", ".join(str(path) for path in files))
    raise_for_failed_checks(result, output)


def _names(text: str) -> tuple[str, ...]:
    """Names that commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _load(folder: str, config) -> PreTrainedModel:
    """Loads a folder as the class that saved it: ours from `modeling`, any other from transformers."""
    name = (config.architectures or [None])[0]
    if name is None:
        raise ValueError(
            f"{folder}/config.json must name its class in `architectures`, and does not; save the model again."
        )
    cls = getattr(modeling, name, None) if name.startswith("Umm") else getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{folder} holds a {name}, which neither transformers nor ummrm knows.")
    return cls.from_pretrained(folder)


def _layers(text: str) -> str | int | list[int]:
    if text == "all":
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'--layers must be "all", a number, or numbers separated by commas, got {text!r}.') from None
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers


def _yaml_mapping(path: Path | None) -> dict:
    if path is None:
        return {}
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of UpcycleConfig fields, got {type(data).__name__}.")
    return data


def _copy_tokenizer(source: str, out: Path) -> None:
    """Takes a local folder's tokenizer files along, so that the new folder is as complete as the old one."""
    for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        for path in Path(source).glob(pattern):
            if path.is_file():
                shutil.copy2(path, out / path.name)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
