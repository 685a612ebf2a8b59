"""The arguments of each stage's trainer: the recipe's by TRL's own names, over defaults that a run needs.

Whatever a block says goes before what `training` says, and that before the defaults here. What a run decides itself
(folders, resuming) can't be said.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from trl import RewardConfig

from ..hf.sharding import partitions
from ..trainer import UmmDistillConfig, UmmMergeConfig
from .processes import launched_to_shard
from .recipe import Recipe, RecipeError, check_arguments

OURS = ("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "seed", "push_to_hub")
"""What a run decides; `seed` is the recipe's own."""
_LENGTH = ("num_train_epochs", "max_steps")
REWARD_MODELS_ALONE = (*_LENGTH, "learning_rate", "center_rewards_coefficient")
"""What `training` says to `dense` and `train` alone: a merge and a distillation have lengths and rates of their own."""
# of every stage: one epoch, a checkpoint at every tenth of it of which the last is kept, no reports to anybody
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,  # a bar of ours shows where all stages stand
}
WITHOUT_ACCELERATOR = {"use_cpu": True, "bf16": False}
"""What goes before TRL's defaults on a machine that has a CPU alone."""
KINDS = {"dense": RewardConfig, "train": RewardConfig, "merge": UmmMergeConfig, "distill": UmmDistillConfig}
"""The class of a stage's arguments."""
BESIDE = {"merge": ("weights", "shared_share", "learn_shared_share", "alpha_init", "alpha_per"), "distill": ("texts",)}
"""What a block has beside the arguments."""


def stage_arguments(recipe: Recipe, stage: str, folder: Path, *, longer: int = 1, checkpointed: bool = True) -> Any:
    """The arguments of a stage's trainer.

    Args:
        recipe: the recipe.
        stage: `dense`, `train`, `merge` or `distill`.
        folder: where it keeps its checkpoints.
        longer: how many times what `training` says the stage takes where its own block says nothing.
        checkpointed: whether the model's activations can be checkpointed, which TRL's default asks for.

    Raises:
        RecipeError: an argument that there is not, one that TRL refuses, or checkpointing where there is none.
    """
    kind, own = KINDS[stage], stage_block(recipe, stage)
    check_block("training", recipe.training, RewardConfig)
    check_block(stage, own, kind)
    common, own = numbers("training", recipe.training, RewardConfig), numbers(stage, own, kind)
    if stage in ("merge", "distill"):
        common = {name: value for name, value in common.items() if name not in REWARD_MODELS_ALONE}
    given = {**DEFAULTS, **common}
    if set(own) & set(_LENGTH):
        given = {name: value for name, value in given.items() if name not in _LENGTH}
    elif longer > 1:
        given |= {name: given[name] * longer for name in _LENGTH if given.get(name, -1) > 0}
    given |= own
    if not checkpointed:
        if given.get("gradient_checkpointing"):
            raise RecipeError(
                f"`{stage}`: gradient_checkpointing must be false or left out for this model, whose activations "
                "transformers can't checkpoint, got true."
            )
        given["gradient_checkpointing"] = False
    if not torch.accelerator.is_available():
        given = {**WITHOUT_ACCELERATOR, **given}
    try:
        return kind(output_dir=str(folder), seed=recipe.seed, **copy.deepcopy(given))  # which it writes into
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"`{stage}`: TRL refuses its arguments: {' '.join(str(error).split())}") from error


def check_sharding(recipe: Recipe, arguments: Mapping[str, Any]) -> None:
    """Raises RecipeError where processes shall share weights and a stage can't be run so.

    Args:
        recipe: the recipe.
        arguments: of each stage that it has.
    """
    for engine in ("fsdp", "deepspeed"):
        whole = [name for name, one in arguments.items() if not getattr(one, engine)]
        if whole and len(whole) < len(arguments):
            raise RecipeError(
                f"`{engine}` must be said of all stages, got none in {', '.join(whole)}; say it in `training`, once."
            )
    shared = any(one.fsdp for one in arguments.values()) or launched_to_shard() or partitions()
    if shared and recipe.lora is not None:
        raise RecipeError(
            "`lora` must be left out with `fsdp` and ZeRO-3: sharded adapters can't be folded in; drop one."
        )


def check_started(arguments: Any, processes: int) -> None:
    """Raises RecipeError where weights are to be shared by the processes, and there is one."""
    if arguments.fsdp and processes < 2:
        raise RecipeError(
            "`training.fsdp` must be left out in one process, which has nobody to share with; start several: "
            "accelerate launch --num_processes 8 -m ummrm ..."
        )


def stage_block(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What a stage's block says of its trainer's arguments."""
    block = getattr(recipe, stage) or {}
    return {name: value for name, value in block.items() if name not in BESIDE.get(stage, ())}


def check_block(name: str, given: Mapping[str, Any], kind: type) -> None:
    """Raises RecipeError unless every argument is one of `kind` that a run leaves to the recipe."""
    for one in given:
        if one in OURS:
            remedy = "it is the recipe's own `seed`" if one == "seed" else "a run decides it itself"
            raise RecipeError(f"`{name}.{one}` must be left out; {remedy}.")
    known = [one for one in inspect.signature(kind).parameters if one not in OURS]
    check_arguments(name, given, [*known, *BESIDE.get(name, ())])


def numbers(block: str, given: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A block's arguments, those that must be numbers as numbers: YAML takes `1e-5`, without a point, for text.

    Raises:
        RecipeError: text that is none stands where a number must.
    """
    hints, made = typing.get_type_hints(kind), dict(given)
    for name, value in given.items():
        kinds = typing.get_args(hints.get(name)) or (hints.get(name),)
        wanted = next((number for number in (int, float) if number in kinds), None)
        if wanted is None or str in kinds or not isinstance(value, str):
            continue
        try:
            made[name] = wanted(value)
        except ValueError:
            what = "a number" if wanted is float else "an integer"
            raise RecipeError(f"`{block}.{name}` must be {what}, got {value!r:.80}.") from None
    return made


def said(arguments: Any) -> dict[str, Any]:
    """What a trainer's arguments say, as plain data that is the same for the same recipe on the same machine."""
    left_out = {"output_dir", "logging_dir", "run_name", "local_rank", "ddp_backend"}
    found = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments) if f.name not in left_out}
    return {
        name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
        for name, value in found.items()
    }
