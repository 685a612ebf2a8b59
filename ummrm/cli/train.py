"""`ummrm train`: the training stage alone, of a dense model, a mixture, or one in its merge phase."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..memory import keep_freed_memory
from . import options, pairs
from .errors import UserError, blaming
from .screen import note, quiet_libraries, say


def _training(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="The training")


def train(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a dense or an upcycled model.")],
    data: Annotated[str, typer.Argument(help="Preference pairs: a file, a folder, or a data set on the hub.")],
    out: Annotated[str, typer.Argument(help="Folder for the trained model, of the same kind.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file of arguments of TRL's RewardConfig; options given here take precedence.",
            rich_help_panel="The training",
        ),
    ] = None,
    learning_rate: Annotated[float | None, _training("Highest learning rate (TRL's default: 1e-4).")] = None,
    num_train_epochs: Annotated[float | None, _training("Passes over the pairs (default: 1).")] = None,
    max_steps: Annotated[int | None, _training("Optimiser steps, in the place of passes.")] = None,
    per_device_train_batch_size: Annotated[
        int | None, _training("Pairs in a step on each device (TRL's default: 8).")
    ] = None,
    max_length: Annotated[
        int | None, _training("Tokens of a text; pairs with a longer one are left out (TRL's default: 1024).")
    ] = None,
    dtype: Annotated[str, _training("Of the weights in training: float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, _training("Seed of what is drawn: fresh heads, orders and groups.")] = 0,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="PAIRS",
            help="Held-out pairs (default: 5% are split off by prompt).",
            rich_help_panel="The data",
        ),
    ] = None,
    columns: pairs.Columns = None,
    split: pairs.Split = None,
    answers: pairs.Answers = None,
    scores: pairs.Scores = None,
    turns: pairs.Turns = None,
    as_messages: pairs.AsMessages = False,
    strict: pairs.Strict = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Trains a reward model on preference pairs: dense, a mixture from `ummrm upcycle`, or merge weights.

    The same command goes on where it was cut off. `ummrm run` does this and
    all stages around it.

    Example: ummrm train moe-rm pairs.jsonl trained-rm --num-train-epochs 4
    """
    try:
        import datasets

        from ..data import DataError
        from ..pipeline import Recipe, RecipeError, train_folder
    except ImportError as error:
        raise UserError(f"`ummrm train` needs more than is installed ({error}); pip install 'ummrm[run]'.") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    given: dict[str, Any] = {
        "learning_rate": learning_rate,
        "num_train_epochs": num_train_epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": per_device_train_batch_size,
        "max_length": max_length,
    }
    arguments = {} if config is None else options.read_options(config)
    arguments |= {name: value for name, value in given.items() if value is not None}
    fields = pairs.fields_of(
        columns=columns, split=split, answers=answers, scores=scores, turns=turns, as_messages=as_messages
    )
    read: dict[str, Any] = {"train": {"path": data, **fields}, "strict": strict}
    if held_out is not None:
        read["held_out"] = {"path": held_out, **fields}
    plain = {
        "model": {"path": model, "dtype": dtype, "trust_remote_code": trust_remote_code},
        "data": read,
        "output": out,
        "seed": seed,
        "train": arguments,
    }
    keep_freed_memory()
    with blaming("", RecipeError, DataError), quiet_libraries():
        found = train_folder(Recipe.from_dict(plain), log=note)
    accuracy = f", held-out accuracy {found['eval_accuracy']:.3f}" if "eval_accuracy" in found else ""
    say(f"{found['steps']} steps{accuracy}, saved in {out}")
