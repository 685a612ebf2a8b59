"""The training stage alone: a dense model, a mixture or one in its merge phase, from a folder into another folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import UpcycleConfig
from ..hf.loading import load_checkpoint
from ..hf.sharding import unpartitioned
from ..trainer import UmmMergeTrainer, UmmRewardTrainer
from ..trainer.base import phase_of
from ..trainer.dense import DenseRewardTrainer
from . import stages
from .adapters import check_lora
from .arguments import check_sharding, check_started, said, stage_arguments
from .processes import processes
from .progress import Bar
from .recipe import Recipe, RecipeError
from .record import Record, locked
from .run import check_folder, read_data
from .start import find_start

_TRAINERS = {None: DenseRewardTrainer, "mixture": UmmRewardTrainer, "merging": UmmMergeTrainer}


def train_folder(recipe: Recipe, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains the recipe's model on its pairs, as `train` of a run does, and leaves the same kind of model in `output`.

    A dense model without a reward head gets a fresh one. Interrupted, the same call goes on.

    Args:
        recipe: its `model`, `data`, `output`, `seed`, `training`, `train` and `lora` count.
        log: takes lines, in the first process.

    Returns:
        Steps, loss and the held-out pairs' metrics.

    Raises:
        RecipeError: the recipe, its model or its folder can't be used; nothing was written then.
        DataError: its data can't be.
    """
    first = processes().is_main_process
    say = log if first else (lambda _: None)
    folder = Path(recipe.output)
    check_folder(folder, made_by="stages")
    start = find_start(recipe.model, recipe.seed, upcycled=True)
    arguments = stage_arguments(recipe, "train", folder / "stages" / "train", checkpointed=start.checkpointed)
    check_sharding(recipe, {"train": arguments})
    check_started(arguments, processes().num_processes)
    if recipe.lora is not None:
        check_lora(recipe.lora)
    pairs = read_data(recipe, start, arguments.max_length)
    for line in (*pairs.report.lines(), *start.notes):
        say(line)
    at = stages.Setting(
        recipe, start, pairs, pairs.train, folder, UpcycleConfig(), {"train": arguments}, lambda stage: [Bar(stage)]
    )
    settings = {**stages.common_settings(at), "arguments": said(arguments)}
    with locked(folder) if first else contextlib.nullcontext():
        record = Record(folder, writes=first)
        found = record.start("train", settings)
        processes().wait_for_everyone()
        if found is None:
            with unpartitioned():
                model = _model(at)
            kind: Any = _TRAINERS[phase_of(model)]
            if kind is UmmMergeTrainer and recipe.lora is not None:
                raise RecipeError("`lora` must be left out for a model in its merge phase, which trains alpha alone.")
            found = stages.fit(stages.make_trainer(kind, at, "train", model), at, "train", folder)
            record.finish("train", settings, found)
            stages.clean(at, "train")
    return found


def _model(at: stages.Setting) -> Any:
    if not at.start.upcycled:
        return at.start.reward_model()
    source = at.recipe.model
    model: Any = load_checkpoint(
        source.path, dtype=getattr(torch, source.dtype), trust_remote_code=source.trust_remote_code
    )
    at.start.name_padding(model)
    at.start.freeze(model)
    return model
