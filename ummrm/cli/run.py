"""`ummrm run`: a recipe, from preference pairs to a merged reward model."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..memory import keep_freed_memory
from . import options
from .errors import UserError, blaming
from .screen import note, quiet_libraries, say, size

if TYPE_CHECKING:
    from ..pipeline import StagePlan


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, output, and a block for each stage.")],
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder to write, in the place of the recipe's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run, in the place of the recipe's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, its data and its model, show what it takes, and stop.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: how many devices will train. Default: one a process.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop where a row of the data makes no pair, instead of leaving it out.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Trains, merges and distils a reward model on your own preference pairs.

    The shortest recipe has three lines: `model: gpt2`, `data: pairs.jsonl`,
    `output: my-rm`; docs/recipes.md has all that it may say. The same command
    goes on where it was cut off. On several devices:
    `accelerate launch -m ummrm run recipe.yaml`.

    Example: ummrm run recipe.yaml --dry-run

    Example: ummrm run recipe.yaml
    """
    try:
        import datasets

        from ..data import DataError
        from ..pipeline import RecipeError, plan_recipe, read_recipe, run_recipe
    except ImportError as error:
        raise UserError(f"`ummrm run` needs more than is installed ({error}); pip install 'ummrm[run]'.") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if devices is not None and not dry_run:
        raise UserError(
            f"`--devices` must be left out without --dry-run, got {devices}; a run has as many as its processes: "
            f"accelerate launch --num_processes {devices} -m ummrm run {recipe}"
        )
    changes = {name: value for name, value in (("output", output), ("seed", seed)) if value is not None}
    with blaming("", RecipeError, DataError), quiet_libraries():
        read = read_recipe(recipe, **changes)
        if strict:
            read = dataclasses.replace(read, data=dataclasses.replace(read.data, strict=True))
        if trust_remote_code:
            read = dataclasses.replace(read, model=dataclasses.replace(read.model, trust_remote_code=True))
        if dry_run:
            _show(plan_recipe(read, log=note, devices=devices))
            return
        keep_freed_memory()
        outcome = run_recipe(read, log=note)
    for name, found in outcome.metrics.items():
        say(f"{name}: accuracy {found['accuracy']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
    say(f"the reward model is in {outcome.folder / 'merged'}, its evaluation in {outcome.folder / 'report.html'}")


def _show(plans: list[StagePlan]) -> None:
    """The stages that train, as a table; computed, not measured."""
    head = ("stage", "parameters", "trained", "steps", "tokens", "FLOPs", *_MEMORY)
    rows = [
        (
            one.stage,
            f"{one.parameters:,}",
            f"{one.trained:,}",
            f"{one.steps:,}",
            f"{one.tokens:.2e}",
            f"{one.flops:.2e}",
            *(size(getattr(one, part)) for part in _MEMORY),
        )
        for one in plans
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    if sum(widths) + 2 * len(widths) - 2 <= shutil.get_terminal_size().columns:
        for row in (head, *rows):
            cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            say("  ".join([row[0].ljust(widths[0]), *cells]))
    else:  # a terminal would break its lines, and nothing would stand below its name
        names, numbers = max(map(len, head[1:])), max(widths[1:])
        for row in rows:
            say(row[0])
            for name, cell in zip(head[1:], row[1:], strict=True):
                say(f"  {name:<{names}}  {cell:>{numbers}}")
    note(f"computed from shapes, {_where(plans[0])}; nothing is measured, and nothing was written")
    note(
        "left out: 16-bit copies that mixed precision keeps of 32-bit weights, attention's matrices, what several "
        "experts a token keep beyond one, one layer's gathered or merged weights and their gradients, the teacher's "
        "memory, and what libraries hold; optimizer is AdamW's, whatever `optim` says"
    )


_MEMORY = ("weights", "gradients", "optimizer", "activations", "memory")


def _where(one: StagePlan) -> str:
    if one.devices == 1:
        return "for one device"
    share = "which share weights, gradients and optimizer" if one.sharded else "which each hold everything"
    return f"for each of {one.devices} devices, {share}"
