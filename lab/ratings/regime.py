"""The regime of real human ratings: blocks of seeds on one data set and one pretrained model.

What the frozen layers give is computed once for all studies and kept in a file whose name depends on texts, model and
number of layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ..backbone.data import Answers, Block, Pairs
from ..backbone.training import OnStep, generators
from ..demo.stages import model_folder
from ..files import digest, kept
from ..tasks import Sequences
from ..workers import quiet_transformers
from .archive import CACHE, fetched_archive
from .bert import BertTop
from .llama import LlamaTop
from .task import RatingsTaskConfig, draw
from .texts import RatedTexts, read_ratings
from .top import TopNetwork

_AT_ONCE = 256  # texts a forward of the frozen layers


def ratings_block(
    config: RatingsTaskConfig, seeds: Sequence[int], cache: Path = CACHE, on_step: OnStep | None = None
) -> Block:
    """The data of `seeds`, and the pretrained layers with a fresh head each.

    Args:
        config: the task.
        seeds: one draw each.
        cache: where the archive and what the frozen layers give are kept.
        on_step: told of texts that have passed the frozen layers.
    """
    rated = read_ratings(Path(config.archive) if config.archive else fetched_archive(cache), config.source)
    stock, tokens, rated = _prepared(config, rated)
    network = network_of(stock, config.trained_layers)
    network.read(frozen_hidden(network, tokens, rated.digest, cache, on_step), tokens.lengths)
    draws = [draw(config, rated, tokens.lengths, seed) for seed in seeds]
    gold = rated.gold

    def answers(texts: list[Tensor]) -> Answers:
        text = torch.stack(texts)
        lengths = tokens.lengths[text]
        return Answers({"text": text}, lengths, lengths.double())

    def pairs(name: str) -> Pairs:
        both = [getattr(one, name) for one in draws]
        return Pairs(answers([p[:, 0] for p in both]), answers([p[:, 1] for p in both]))

    return Block(
        seeds=tuple(seeds),
        network=network,
        start=network.with_head(generators(seeds, "head")),
        train=pairs("train"),
        test=pairs("test"),
        shifted=pairs("shifted"),
        policy=answers([one.policy for one in draws]),
        gold=torch.stack([gold[one.policy] for one in draws])[:, None],
        unlabelled=answers([one.unlabelled for one in draws]),
        label_noise=tuple(one.label_noise for one in draws),
    )


def network_of(stock: PreTrainedModel, trained_layers: int) -> TopNetwork:
    """The network of a reward model's architecture.

    Raises:
        ValueError: there is none.
    """
    kinds = {"bert": BertTop, "llama": LlamaTop}
    if stock.config.model_type not in kinds:
        raise ValueError(f"`model` must be one of {', '.join(kinds)}, got {stock.config.model_type!r}.")
    return kinds[stock.config.model_type](stock, trained_layers)


def _prepared(config: RatingsTaskConfig, rated: RatedTexts) -> tuple[PreTrainedModel, Sequences, RatedTexts]:
    """The model, and the texts that are short and rated enough, as tokens too."""
    folder = model_folder(config.model)
    assert folder is not None  # the configuration's check has seen to it
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # that the head is fresh, which it is meant to be
    try:
        with quiet_transformers():
            stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
    finally:
        transformers.logging.set_verbosity(said)
    ids = tokenizer(list(rated.texts))["input_ids"]
    kept_texts = [
        i
        for i, (row, ratings) in enumerate(zip(ids, rated.ratings, strict=True))
        if len(row) <= config.max_tokens and len(ratings) >= config.min_raters
    ]
    if not kept_texts:
        raise ValueError(
            f"RatingsTaskConfig: `max_tokens` and `min_raters` must leave texts, got {config.max_tokens} and "
            f"{config.min_raters}, which none of {len(rated)} meet."
        )
    return stock, Sequences.from_lists([ids[i] for i in kept_texts], tokenizer.pad_token_id), rated.select(kept_texts)


@torch.no_grad()
def frozen_hidden(
    network: TopNetwork, tokens: Sequences, texts_digest: str, cache: Path, on_step: OnStep | None = None
) -> Tensor:
    """What the layers below the trained ones give, live tokens alone, one text after another: fp32 [tokens, H].

    Args:
        network: whose stock model's lower layers are run.
        tokens: all texts.
        texts_digest: of the texts, for the file's name.
        cache: the file's folder.
        on_step: told of texts done and texts in all.
    """
    name = digest([texts_digest, list(tokens.tokens.shape), tokens.tokens, network.below, network.frozen()])[:16]

    def make() -> dict:
        rows: dict[int, Tensor] = {}
        by_length = tokens.lengths.argsort(stable=True).split(_AT_ONCE)  # so that little is padding
        for index in by_length:
            some = tokens.select(index)
            hidden = _read_by_the_trained(network, some.inputs())
            for text, length, row in zip(index.tolist(), some.lengths.tolist(), hidden, strict=True):
                rows[text] = row[:length]
            if on_step is not None:
                on_step(len(rows), len(tokens))
        return {"hidden": torch.cat([rows[text] for text in range(len(tokens))])}

    return kept(cache / f"hidden-{name}.pt", make)["hidden"]


class _ReachedError(Exception):
    """The first trained layer was reached."""


def _read_by_the_trained(network: TopNetwork, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states [n, T, H] that the first trained layer reads; it and those above it are not run."""
    found: list[Tensor] = []

    def stop(_, args: tuple, given: dict) -> None:
        found.append(args[0] if args else given["hidden_states"])
        raise _ReachedError

    hook = network.layers()[network.below].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(_ReachedError):
            network.stock.base_model(**inputs)
    finally:
        hook.remove()
    return found[0]
