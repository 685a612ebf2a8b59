"""`ummrm merge`: a saved upcycled model into one dense model of its original class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig

from .. import MergeConfig, prepare_merge, save_pretrained
from .. import merge as merge_model
from .folders import copy_tokenizer, load_model
from .output import say


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
    model = load_model(moe, config)
    if phase == "mixture":
        prepare_merge(model, MergeConfig() if shared_share is None else MergeConfig(shared_share=shared_share))
    dense = merge_model(model)
    save_pretrained(dense, out)
    copy_tokenizer(moe, out)
    how = "learned" if phase == "merging" else "uniform"
    say(f"{type(dense).__name__}, {how} merge weights, saved in {out}; stock transformers loads it")
