"""Runs a recipe: everything checked first, then stage after stage; the same command goes on after a kill."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset

from ..config import UpcycleConfig
from ..data import PreferenceData, read_pairs
from ..files import write_atomically, write_json
from ..hf.texts import texts_of, token_ids
from ..version import __version__
from . import stages
from .adapters import check_lora
from .arguments import check_sharding, check_started, said, stage_arguments
from .measure import measure
from .plan import StagePlan, plan, shapes
from .processes import processes
from .progress import Bar
from .recipe import Recipe, RecipeError
from .record import Record, locked
from .start import Start, find_start, stock_config_of

_SOME = 500  # pairs whose lengths stand for all
_VERSIONS = ("torch", "transformers", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        folder: its folder.
        metrics: of each model: accuracy on the held-out pairs, with its interval.
        stages: what each stage found.
    """

    folder: Path
    metrics: dict[str, dict[str, Any]]
    stages: dict[str, dict[str, Any]]


def run_recipe(recipe: Recipe, *, log: Callable[[str], None] = print) -> Outcome:
    """Runs a recipe, or goes on with one.

    Under `accelerate launch` every process calls this.

    Args:
        recipe: the recipe.
        log: takes a line for each stage, in the first process.

    Returns:
        What it left: `merged`, the stock reward model; `mixture`; `dense` where the recipe has one; `report.html` and
        `evaluation.json`, what they are worth; `metrics.json`; `recipe.yaml`, the recipe with all that it says;
        `run.json`, data, versions and what stages found.

    Raises:
        RecipeError: the recipe, its model or its folder can't be used; nothing was written then.
        DataError: its data can't be.
    """
    first = processes().is_main_process
    say = log if first else (lambda _: None)
    at = prepare(recipe, say)
    check_started(at.arguments["train"], processes().num_processes)
    with locked(at.folder) if first else contextlib.nullcontext():
        return _run(at, say, first)


def plan_recipe(recipe: Recipe, *, log: Callable[[str], None] = print, devices: int | None = None) -> list[StagePlan]:
    """Checks a recipe with its data and its model's files, and counts what its stages will take; writes nothing.

    Args:
        recipe: the recipe.
        log: takes lines on what was read and left out.
        devices: how many will train; None: as many as there are processes. Where the recipe's `training` has `fsdp`,
            they share weights, gradients and moments; else each holds all of them.

    Raises:
        RecipeError: as `run_recipe`.
        DataError: as `run_recipe`.
    """
    at = prepare(recipe, log)
    config = stock_config_of(recipe.model)
    some = at.pairs.train.select(range(min(_SOME, len(at.pairs.train))))
    lengths = [len(token_ids(at.start.tokenizer, text, row)) for row in some for text in texts_of(row)]
    texts = len(at.texts) * (1 if recipe.texts() else 2)
    sizes: dict[str, Any] = {"pairs": len(at.pairs.train), "texts": texts, "lengths": lengths}
    return plan_stages(recipe, config, at.upcycle, at.arguments, devices=devices, **sizes)


def plan_stages(
    recipe: Recipe, config: Any, upcycle: UpcycleConfig, arguments: Mapping[str, Any], **sizes: Any
) -> list[StagePlan]:
    """What the stages of a recipe that train will take, of a model's configuration alone.

    Args:
        recipe: the recipe.
        config: the stock model's.
        upcycle: what becomes of it.
        arguments: of each stage that it has.
        sizes: `pairs`, `texts`, `lengths` and `devices` of `plan`.

    Raises:
        RecipeError: as `shapes`.
    """
    merge = recipe.merge_config()
    found = shapes(config, upcycle, dtype=recipe.model.dtype, frozen=recipe.model.frozen, lora=recipe.lora, merge=merge)
    trained = {name: one for name, one in arguments.items() if name != "merge" or recipe.merge_weights == "learned"}
    return plan(found, trained, members=upcycle.num_experts if upcycle.by_sequence else 0, **sizes)


def prepare(recipe: Recipe, say: Callable[[str], None]) -> stages.Setting:
    """Everything that can be checked before any work, and what all stages read; writes nothing.

    Raises:
        RecipeError: as `run_recipe`.
        DataError: as `run_recipe`.
    """
    folder = Path(recipe.output)
    check_folder(folder)
    start = find_start(recipe.model, recipe.seed)
    upcycle = recipe.upcycle_config(start.fresh)
    arguments = every_argument(recipe, upcycle, folder / "stages", checkpointed=start.checkpointed)
    check_sharding(recipe, arguments)
    if recipe.lora is not None:
        check_lora(recipe.lora)
    pairs = read_data(recipe, start, arguments["train"].max_length)
    texts = _texts(recipe, pairs)
    for line in (*pairs.report.lines(), *start.notes):
        say(line)
    return stages.Setting(recipe, start, pairs, texts, folder, upcycle, arguments, lambda stage: [Bar(stage)])


def every_argument(
    recipe: Recipe, upcycle: UpcycleConfig, folder: Path, *, checkpointed: bool = True
) -> dict[str, Any]:
    """The arguments of each stage's trainer, by stage.

    Args:
        recipe: the recipe.
        upcycle: what becomes of its model, which says how long the mixture is trained.
        folder: where stages keep their checkpoints.
        checkpointed: whether the model's activations can be checkpointed.

    Raises:
        RecipeError: as `stage_arguments`.
    """
    used = [name for name in ("dense", "train", "merge", "distill") if _is_run(recipe, name)]
    longer = {"train": recipe.longer(upcycle)}
    return {
        name: stage_arguments(recipe, name, folder / name, longer=longer.get(name, 1), checkpointed=checkpointed)
        for name in used
    }


def _run(at: stages.Setting, say: Callable[[str], None], first: bool) -> Outcome:
    recipe, record = at.recipe, Record(at.folder, writes=first)
    work: dict[str, Callable[[stages.Setting], dict[str, Any]]] = {
        "dense": stages.train_dense,
        "train": stages.train_mixture,
        "merge": stages.merge_mixture,
        "distill": stages.distill_members,
        "evaluate": measure,
    }
    todo = [name for name in work if _is_run(recipe, name)]
    settings = _settings(at)
    if first:
        write_run(at, None)
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {_TITLES[name]}"
        earlier = record.start(name, settings[name])
        processes().wait_for_everyone()
        if earlier is not None:
            found[name] = earlier
            say(f"{head}: done before{_words(earlier)}")
            continue
        began = time.monotonic()
        found[name] = {**work[name](at), "seconds": round(time.monotonic() - began, 1)}
        record.finish(name, settings[name], found[name])
        stages.clean(at, name)
        gc.collect()
        say(f"{head}: {found[name]['seconds']:.0f} s{_words(found[name])}")
    metrics = found["evaluate"]["models"]
    if first:
        write_json(at.folder / "metrics.json", {"models": metrics, "stages": found})
        write_run(at, found)
    return Outcome(at.folder, metrics, found)


_TITLES = {
    "dense": "dense control",
    "train": "upcycle and train",
    "merge": "merge",
    "distill": "distill",
    "evaluate": "evaluate",
}


def _is_run(recipe: Recipe, stage: str) -> bool:
    """Whether a recipe has a stage."""
    if stage in ("dense", "distill"):
        return getattr(recipe, stage) is not None
    return True


def _settings(at: stages.Setting) -> dict[str, dict[str, Any]]:
    """Of each stage all that its result depends on."""
    recipe = at.recipe
    common = stages.common_settings(at)
    arguments = {name: said(one) for name, one in at.arguments.items()}
    dense = {**common, "arguments": arguments.get("dense")}
    train = {**common, "upcycle": at.upcycle.to_dict(), "arguments": arguments["train"]}
    config = recipe.merge_config()
    learned = {"arguments": arguments["merge"]} if recipe.merge_weights == "learned" else {}
    merged = {
        "train": train,
        "weights": recipe.merge_weights,
        "merge": None if config is None else config.to_dict(),
        "distill": recipe.distill is not None,  # it decides where the merged model goes
        **learned,
    }
    distilled = {"merge": merged, "texts": stages.digest(at.texts), "arguments": arguments.get("distill")}
    made: dict[str, dict[str, Any]] = {"dense": dense, "train": train, "merge": merged, "distill": distilled}
    every = {name: made[name] for name in ("dense", "merge", "distill") if _is_run(recipe, name)}
    every["config"] = stages.plain(recipe.evaluation_config())
    return {**made, "evaluate": every}


# ---- data ----------------------------------------------------------------------------------------------------------


def read_data(recipe: Recipe, start: Start, max_length: int | None) -> PreferenceData:
    """The recipe's pairs, those that are longer than `max_length` tokens left out.

    Raises:
        DataError: as `ummrm.data.read_pairs`.
    """

    def length(texts: Sequence[Any]) -> list[int]:
        return [len(token_ids(start.tokenizer, text)) for text in texts]

    return read_pairs(recipe.data, length=length, max_length=max_length)


def _texts(recipe: Recipe, pairs: PreferenceData) -> Dataset:
    """Texts for distillation: those that the recipe names, or the training answers."""
    sources = recipe.texts()
    if recipe.distill is None or not sources:
        return pairs.train
    for source in sources:
        if not Path(source).is_file():
            raise RecipeError(f"`distill.texts` must name files of texts, and {source} is none.")
    kinds = {Path(source).suffix.lstrip(".") for source in sources}
    kind = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}.get(next(iter(kinds)))
    if len(kinds) != 1 or kind is None:
        raise RecipeError(
            f"`distill.texts` must be files of one kind, jsonl, json, csv or parquet, got {sorted(kinds)}."
        )
    try:
        texts: Any = load_dataset(kind, data_files=list(sources), split="train")
    except Exception as error:  # whatever the reader makes of a broken file
        said_there = " ".join(str(error.__cause__ or error).split())
        raise RecipeError(f"`distill.texts` can't be read: {said_there[:300]}") from error
    for number, row in enumerate(texts, 1):
        try:
            texts_of(row)
        except ValueError as error:
            raise RecipeError(f"`distill.texts`: row {number}: {error}") from error
    return texts


# ---- the folder ----------------------------------------------------------------------------------------------------


def check_folder(folder: Path, made_by: str = "run.json") -> None:
    """Raises RecipeError unless a run can write a folder: there is none, it is empty, or a run made it.

    Args:
        folder: the folder.
        made_by: what a run that made it has left there.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"`output` must be a folder, and {folder} is a file; give another.")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if held and made_by not in held and set(held) - {".lock"}:
        raise RecipeError(
            f"`output` must be a new folder or one of an earlier run, and {folder} holds {held[0]} and no {made_by}; "
            "give another."
        )
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        probe = place / f".ummrm-{hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"`output` {folder} can't be written: {error.strerror}; give another.") from error


def write_run(at: stages.Setting, found: dict[str, Any] | None) -> None:
    """The recipe with all that it says, and what it was run on."""
    text = yaml.safe_dump(at.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomically(at.folder / "recipe.yaml", text)
    facts = {
        "ummrm": __version__,
        **{name: importlib.metadata.version(name) for name in _VERSIONS},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "processes": processes().num_processes,
    }
    data = at.pairs.report.to_dict()
    write_json(at.folder / "run.json", {"versions": facts, "notes": at.start.notes, "data": data, "stages": found})


def _words(found: dict[str, Any]) -> str:
    """What a stage found, behind a line."""
    if "models" in found:
        return "".join(f"; {name} {one['accuracy']:.3f}" for name, one in found["models"].items())
    accuracy = f", held-out accuracy {found['eval_accuracy']:.3f}" if "eval_accuracy" in found else ""
    gap = f", gap to the members {found['eval_teacher_gap']:.3f}" if "eval_teacher_gap" in found else ""
    return (f", {found['steps']} steps" if "steps" in found else "") + accuracy + gap
