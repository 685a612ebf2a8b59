"""The stages of a run, each from the folder of the one before it to a folder of its own.

A stage that trains keeps checkpoints and goes on from the last whole one. Models pass between stages on disk alone, so
that a run that was cut off and one that was not compute the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PrinterCallback

from ..config import UpcycleConfig
from ..data import PreferenceData
from ..files import write_json
from ..hf.loading import load_checkpoint
from ..hf.saving import save_pretrained, save_shared
from ..hf.sharding import is_sharded, unpartitioned
from ..hf.tokenizers_v4 import save_tokenizer
from ..merge import prepare_merge, save_merged
from ..trainer import UmmDistillTrainer, UmmMergeTrainer, UmmRewardTrainer
from ..trainer.dense import DenseRewardTrainer
from ..upcycle import upcycle
from .adapters import folded, lora_config
from .processes import forget_engine, processes
from .recipe import Recipe
from .start import Start

DENSE, MIXTURE, MERGED = "dense", "mixture", "merged"
"""Folders of models that a run leaves."""


@dataclass(frozen=True)
class Setting:
    """What all stages read.

    Attributes:
        recipe: the recipe.
        start: the model that it starts from.
        pairs: its pairs.
        texts: for distillation, without labels.
        folder: the run's.
        upcycle: what becomes of the model.
        arguments: of each stage that trains.
        callbacks: a stage's, for its trainer.
    """

    recipe: Recipe
    start: Start
    pairs: PreferenceData
    texts: Dataset
    folder: Path
    upcycle: UpcycleConfig
    arguments: Mapping[str, Any]
    callbacks: Callable[[str], list]

    def model(self, name: str) -> Path:
        """The folder of a model that the run leaves."""
        return self.folder / name

    @property
    def undistilled(self) -> Path:
        """The merged model before distillation, or the one that the run leaves where there is none."""
        return self.model(MERGED) if self.recipe.distill is None else self.folder / "stages" / "merge" / "model"


def train_dense(at: Setting) -> dict[str, Any]:
    """The dense control: the same start, pairs and head."""
    with unpartitioned():
        dense = at.start.reward_model()
    trainer = make_trainer(DenseRewardTrainer, at, DENSE, dense)
    return fit(trainer, at, DENSE, at.model(DENSE))


def train_mixture(at: Setting) -> dict[str, Any]:
    """Upcycles the model and trains the mixture."""
    with warnings.catch_warnings(), unpartitioned():
        warnings.simplefilter("ignore", UserWarning)  # the run's log says that the head is fresh
        torch.manual_seed(at.recipe.seed)  # of routers
        if at.start.fresh and at.upcycle.has_head_experts:
            moe = upcycle(at.start.load(), at.upcycle, new_head=True, tokenizer=at.start.tokenizer, seed=at.recipe.seed)
        else:
            moe = upcycle(at.start.reward_model(), at.upcycle)
    at.start.name_padding(moe)
    at.start.freeze(moe)
    return fit(make_trainer(UmmRewardTrainer, at, "train", moe), at, "train", at.model(MIXTURE))


def merge_mixture(at: Setting) -> dict[str, Any]:
    """Merges the mixture's experts, by their mean or by weights that are learned first."""
    found: dict[str, Any] = {}
    config = at.recipe.merge_config()
    moe = _load(at, at.model(MIXTURE), "upcycled")
    if at.recipe.merge_weights == "learned":
        trainer = make_trainer(UmmMergeTrainer, at, "merge", moe, merge_config=config)
        found = fit(trainer, at, "merge", None)
        moe = trainer.accelerator.unwrap_model(trainer.model)
    elif config is not None:
        moe = prepare_merge(moe, config)
    save_merged(moe, at.undistilled)  # by all processes, which may share it
    in_first(lambda: save_tokenizer(at.start.tokenizer, at.undistilled))
    return found


def distill_members(at: Setting) -> dict[str, Any]:
    """Teaches the merged model the scores of the mixture's members."""
    student = _load(at, at.undistilled, "dense")
    at.start.freeze(student)
    # by its path, so that processes share its weights
    teacher = {"teacher": at.model(MIXTURE), "teacher_processing_class": at.start.tokenizer}
    trainer = make_trainer(
        UmmDistillTrainer, at, "distill", student, **teacher, data=at.texts, held_out=at.pairs.held_out
    )
    found = fit(trainer, at, "distill", at.model(MERGED))
    return {"gap_at_start": trainer.gap_at_start, **found}


def make_trainer(
    kind: Any, at: Setting, stage: str, model: Any, *, data: Any = None, held_out: Any = None, **more: Any
) -> Any:
    if at.recipe.lora is not None and stage != "merge":  # which trains merge weights alone
        more["peft_config"] = lora_config(at.recipe.lora, model)
    forget_engine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = kind(
            model,
            at.arguments[stage],
            train_dataset=at.pairs.train if data is None else data,
            eval_dataset=at.pairs.held_out if held_out is None else held_out,
            processing_class=at.start.tokenizer,
            callbacks=at.callbacks(stage),
            **more,
        )
    trainer.remove_callback(PrinterCallback)  # the log has a line for a stage
    return trainer


def fit(trainer: Any, at: Setting, stage: str, target: Path | None) -> dict[str, Any]:
    """Trains, from the last checkpoint where there is one; saves the model and what was found."""
    folder = at.folder / "stages" / stage
    checkpoint = last_checkpoint(folder)
    done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = {name: value for name, value in trainer.evaluate().items() if isinstance(value, (int, float))}
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    shared = is_sharded(model)
    if target is not None and shared:
        save_shared(model, target)

    def save() -> None:
        if target is not None:
            if not shared:
                save_pretrained(folded(model).eval(), target)
            save_tokenizer(at.start.tokenizer, target)
        write_json(folder / "log.json", trainer.state.log_history)

    in_first(save)
    steps = trainer.state.global_step
    timed = ("runtime", "per_second")
    return {
        "steps": steps,
        "loss": done.training_loss,
        **{name: value for name, value in metrics.items() if not any(one in name for one in timed)},
    }


def common_settings(at: Setting) -> dict[str, Any]:
    """What every stage's result depends on, as plain data."""
    recipe, model = at.recipe, plain(at.recipe.model)
    del model["trust_remote_code"]  # whether it may be loaded, not what it is
    return {
        "seed": recipe.seed,
        "lora": None if recipe.lora is None else dict(recipe.lora),
        "model": {**model, **at.start.digest()},
        "data": {"train": digest(at.pairs.train), "held_out": digest(at.pairs.held_out)},
    }


def digest(rows: Dataset) -> str:
    """Of the content of a data set, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode(errors="surrogatepass"))
    return found.hexdigest()[:16]


def clean(at: Setting, stage: str) -> None:
    """Removes the checkpoints of a stage that is done."""

    def remove() -> None:
        for path in (at.folder / "stages" / stage).glob("checkpoint-*"):
            shutil.rmtree(path)

    in_first(remove)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole.

    transformers writes `trainer_state.json` after all else, and removes older checkpoints only then.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if number.isdecimal():
            found.append((int(number), path))
    return max(found)[1] if found else None


def in_first(work: Callable[[], Any]) -> None:
    """Does something in the first process alone, while the others wait."""
    state = processes()
    if state.is_main_process:
        work()
    state.wait_for_everyone()


def _load(at: Setting, folder: Path, expect: Literal["dense", "upcycled"]) -> Any:
    with unpartitioned():
        return load_checkpoint(folder, expect=expect, dtype=getattr(torch, at.recipe.model.dtype))


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
