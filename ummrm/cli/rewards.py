"""A reward model that a command scores with: its options, what its configuration must say, and its loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .errors import UserError, blaming
from .source import Source, admit_code, has_tokenizer, open_source

if TYPE_CHECKING:
    from ..evaluation.scoring import RewardScorer

_PANEL = "How models score"

BatchSize = Annotated[int, typer.Option(help="Texts in one forward pass.", rich_help_panel=_PANEL)]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a text; a longer one is cut there, and counted (default: what the model takes).",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.", rich_help_panel=_PANEL)]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16 (default: as saved).", show_default=False, rich_help_panel=_PANEL),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub name.", show_default=False, rich_help_panel=_PANEL)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with a model or its tokenizer, which can do whatever you can.",
        rich_help_panel=_PANEL,
    ),
]


def check_scoring(batch_size: int, max_length: int | None, device: str, dtype: str | None) -> None:
    """Raises UserError for values that can't be meant."""
    for name, value in (("--batch-size", batch_size), ("--max-length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"`{name}` must be at least 1, got {value}.")
    options.check_dtype(dtype)
    options.check_device(device)


def open_reward_model(name: str, *, revision: str | None, trust_remote_code: bool) -> Source:
    """Finds a model and checks that it can be a reward model, without its weights.

    Raises:
        UserError: there is none, it has no reward head or several labels, or no tokenizer.
    """
    source = open_source(name, revision)
    config = source.config
    admit_code(source, trust_remote_code)
    if not trust_remote_code:
        if not source.class_name.endswith("ForSequenceClassification"):
            raise UserError(
                f"{name} has no reward head: it is a {source.class_name}; give a model for sequence classification "
                "with one label."
            )
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise UserError(f"{name} must give one reward per sequence, and has {labels} labels; give a model with one.")
    if not has_tokenizer(source.folder):
        raise UserError(f"{name} has no tokenizer beside its weights; save the one that it was trained with there.")
    return source


def load_scorer(
    source: Source, *, device: str, dtype: str | None, trust_remote_code: bool, **more: Any
) -> RewardScorer:
    """Loads a model that was found.

    Raises:
        UserError: it can't be loaded, or can't score.
    """
    from ..evaluation.scoring import RewardScorer

    with blaming(f"{source.name} can't be loaded", Exception):
        return RewardScorer.load(source.folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, **more)
