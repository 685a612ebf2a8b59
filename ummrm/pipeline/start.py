"""The model and the tokenizer that a run starts from.

A finished reward model keeps its head; anything else gets a fresh one, and the log says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..hf.head import gives_scores
from ..hf.loading import load_checkpoint
from ..hf.registry import umm_config_class
from ..hf.remote_code import needs_code, register_code
from ..hf.reward_head import reward_model
from .recipe import ModelSource, RecipeError


@dataclass(frozen=True)
class Start:
    """A model that can be loaded as often as stages need it.

    Attributes:
        source: where it is.
        tokenizer: its tokenizer, with a padding and an end-of-sequence token.
        fresh: whether its reward head is fresh.
        seed: of the fresh head.
        notes: what was made up, for the log.
        upcycled: whether it is a mixture already.
        checkpointed: whether transformers can checkpoint the activations of its class.
    """

    source: ModelSource
    tokenizer: Any
    fresh: bool
    seed: int
    notes: tuple[str, ...] = ()
    upcycled: bool = False
    checkpointed: bool = True

    def load(self) -> PreTrainedModel:
        """The model as it is, without a fresh head."""
        with blaming_the_model(self.source):
            trust = self.source.trust_remote_code
            model: Any = load_checkpoint(
                self.source.path, expect="dense", trust_remote_code=trust, **_where(self.source)
            )
        return model

    def reward_model(self) -> PreTrainedModel:
        """The dense reward model, under its own head or a fresh one; the same numbers at every call."""
        model: Any = self.load()
        if self.fresh:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the run's log says it
                model = reward_model(_bare(model), self.tokenizer, seed=self.seed)
        self.name_padding(model)
        self.freeze(model)
        return model

    def freeze(self, model: Any) -> None:
        """Excludes from training what the recipe says."""
        freeze(model, self.source.frozen)

    def name_padding(self, model: Any) -> None:
        """Tells a model what batches are padded with."""
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def digest(self) -> dict[str, Any]:
        """What the model is, as plain data: its revision, or its files' names, sizes and times."""
        folder = Path(self.source.path)
        if not folder.is_dir():
            return {"path": self.source.path, "revision": _commit(self.source)}
        kinds = (".safetensors", ".bin", ".json", *((".py",) if self.source.trust_remote_code else ()))
        files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.suffix in kinds]
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return {"path": str(folder.resolve()), "files": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}


def freeze(model: Any, frozen: tuple[str, ...]) -> None:
    """Excludes the parameters from training whose names begin as `frozen` says."""
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)


def find_start(source: ModelSource, seed: int, *, upcycled: bool = False) -> Start:
    """Looks a model up: its configuration and its tokenizer, not yet its weights.

    Args:
        source: where it is.
        seed: of a fresh head.
        upcycled: whether one with experts will do.

    Raises:
        RecipeError: there is none, or none that a reward model can be made of.
    """
    if os.path.sep in source.path and not Path(source.path).is_dir() and source.path.startswith((".", "/", "~")):
        raise RecipeError(f"`model.path` must be a folder or a name on the hub, and there is no folder {source.path}.")
    config = stock_config_of(source, upcycled=upcycled)
    has_experts = getattr(config, "umm", None) is not None
    if has_experts and not upcycled:
        raise RecipeError(
            f"`model.path` must be a dense model, and {source.path} is upcycled already; give the model that it was "
            "made of, or train it with UmmRewardTrainer."
        )
    stock = stock_class_of(config, required=not source.trust_remote_code)
    named = (config.architectures or [""])[0]
    has_head = named.endswith("ForSequenceClassification") and config.num_labels == 1
    if source.head == "keep" and not has_head:
        raise RecipeError(
            f"`model.head` must be auto or fresh: {source.path} is a {named or 'backbone'} with {config.num_labels} "
            "labels and has no reward head to keep."
        )
    if source.head == "auto" and named.endswith("ForSequenceClassification") and not has_head:
        raise RecipeError(
            f"`model.path` must be a reward model or a backbone, and {source.path} is a classifier of "
            f"{config.num_labels} labels; set `model.head: fresh` to put a reward head in the place of its own."
        )
    _check_frozen(source, config, stock)
    try:
        trust = {"trust_remote_code": source.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(source.path, **trust, **_revision(source))
    except Exception as error:  # whatever a folder without a sound tokenizer makes of it
        raise RecipeError(
            f"`model.path` must have a tokenizer, and that of {source.path} can't be loaded: "
            f"{_without_advice(error)[:300]}"
        ) from error
    fresh = source.head == "fresh" or not has_head
    notes = [f"the reward head is fresh (seed {seed})"] if fresh else []
    return Start(
        source,
        tokenizer,
        fresh,
        seed,
        (*notes, *_complete(tokenizer)),
        has_experts,
        stock is not None and stock.supports_gradient_checkpointing,
    )


def stock_class_of(config: Any, *, required: bool = True) -> Any:
    """The class for reward models that transformers has for a configuration.

    Raises:
        RecipeError: it has none, where one is required; else that is None.
    """
    mapping: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    stock = mapping.get(type(config), None)
    if stock is None and required:
        raise RecipeError(
            "`model.path` must be of a family that has a class for reward models, and transformers has none for "
            f"model_type {config.model_type!r}; use a model of another family."
        )
    return stock


def stock_config_of(source: ModelSource, *, upcycled: bool = True) -> Any:
    """A model's configuration; code that comes with it is run, and registered, where the recipe trusts it.

    Args:
        source: where it is.
        upcycled: whether a model that can't be upcycled, for what its code lacks, will do.

    Raises:
        RecipeError: there is none, or code that is not trusted or can't be used.
    """
    with blaming_the_model(source):
        saved, _ = PreTrainedConfig.get_config_dict(source.path, **_revision(source))
        if needs_code(saved) and not source.trust_remote_code:
            raise RecipeError(
                f"`model.path` ({source.path}) comes with code of its own; set `model.trust_remote_code: true`, or "
                "give --trust-remote-code, if you trust its authors."
            )
        if source.trust_remote_code:
            register_code(source.path, **_revision(source))
        config: Any = AutoConfig.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, **_revision(source)
        )
        if source.trust_remote_code and not upcycled and getattr(config, "umm", None) is None:
            umm_config_class(config.model_type)  # says what its code lacks
    return config


def _without_advice(error: BaseException) -> str:
    said = " ".join(str(error).split())
    if "trust_remote_code" not in said:
        return said
    return "it comes with code of its own; set `model.trust_remote_code: true`, or give --trust-remote-code"


def _check_frozen(source: ModelSource, config: Any, stock: Any) -> None:
    if stock is None or not source.frozen:
        return
    with torch.device("meta"):
        names = [name for name, _ in stock(config).named_parameters()]
    for beginning in source.frozen:
        if not any(name.startswith(beginning) for name in names):
            raise RecipeError(
                f"`model.frozen` must be beginnings of names of parameters, and no parameter of a {stock.__name__} "
                f"begins with {beginning!r}; its first is {names[0]}."
            )


def _complete(tokenizer: Any) -> list[str]:
    """Names the tokens that a reward model's training needs, where the tokenizer does not; says which."""
    notes = []
    if tokenizer.eos_token is None:
        if tokenizer.sep_token is None:
            raise RecipeError(
                f"the tokenizer ({type(tokenizer).__name__}) must have an end-of-sequence or a separator token, and "
                "has neither; set `eos_token` in its tokenizer_config.json."
            )
        tokenizer.eos_token = tokenizer.sep_token
        notes.append(f"the tokenizer has no end-of-sequence token; its separator {tokenizer.sep_token} ends texts")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no padding token; {tokenizer.eos_token} pads")
    return notes


def _bare(model: Any) -> Any:
    """Without a head of another kind."""
    return model.base_model if gives_scores(type(model)) else model


def _where(source: ModelSource) -> dict[str, Any]:
    return {"dtype": getattr(torch, source.dtype), **_revision(source)}


def _revision(source: ModelSource) -> dict[str, str]:
    return {"revision": source.revision} if source.revision else {}


def _commit(source: ModelSource) -> str:
    return str(getattr(stock_config_of(source), "_commit_hash", None) or source.revision or "main")


@contextlib.contextmanager
def blaming_the_model(source: ModelSource) -> Iterator[None]:
    """Turns what loading a model raises into a RecipeError."""
    try:
        yield
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())
        raise RecipeError(f"`model.path` ({source.path}) can't be loaded: {said[:400]}") from error
