"""The synthetic regimes: blocks of seeds of the language task, each seed's backbone pretrained on its own language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import kept
from ..seeds import derive
from ..tasks.base import PreferencePairs, Sequences
from ..tasks.language import LanguageTaskConfig, make_language_task, with_filler
from ..tasks.synthetic import FILLER, PAD
from .data import Answers, Block, Pairs
from .llama import Llama, LlamaShape
from .optimiser import Optimisation
from .training import OnStep, generators, pretrain

_FRAME = 3  # topic, separator, end


@dataclass(frozen=True)
class PretrainingConfig:
    """How a backbone becomes a language model.

    Attributes:
        steps: of AdamW.
        batch: answers a step.
        learning_rate: highest.
    """

    steps: int = 600
    batch: int = 48
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"PretrainingConfig: `{name}` must be at least 1, got {getattr(self, name)}.")


def language_block(
    config: LanguageTaskConfig,
    shape: LlamaShape,
    pretraining: PretrainingConfig,
    seeds: Sequence[int],
    folder: Path | None = None,
    on_step: OnStep | None = None,
) -> Block:
    """Draws the data of `seeds` and pretrains their backbones.

    Args:
        config: the task.
        shape: the model.
        pretraining: of the backbones.
        seeds: one language each.
        folder: where the backbones are kept; None keeps them in memory alone.
        on_step: told of pretraining steps.
    """
    tasks = [make_language_task(config, derive(seed, "language")) for seed in seeds]
    width = config.max_content + max(config.policy_filler_cap, config.max_train_filler) + _FRAME
    train_width = config.max_content + config.max_train_filler + _FRAME
    if width > shape.longest:
        raise ValueError(f"LlamaShape: `longest` must be at least the answers' {width} tokens, got {shape.longest}.")

    def pairs(get: Callable[[int], PreferencePairs]) -> Pairs:
        both = [get(i) for i in range(len(seeds))]
        return Pairs(
            side_by_side([p.chosen for p in both], train_width), side_by_side([p.rejected for p in both], train_width)
        )

    network = Llama(shape, tasks[0].task.vocab_size, PAD)
    corpus = side_by_side([t.corpus for t in tasks], width)

    def backbone() -> dict:
        trained, losses = pretrain(
            network,
            corpus,
            seeds,
            pretraining.steps,
            pretraining.batch,
            pretraining.learning_rate,
            Optimisation(),
            on_step,
        )
        return {"parameters": trained, "losses": losses}

    found = backbone() if folder is None else kept(folder / "backbone.pt", backbone)
    return Block(
        seeds=tuple(seeds),
        network=network,
        start=network.with_head(found["parameters"], generators(seeds, "head")),
        train=pairs(lambda i: tasks[i].task.train),
        test=pairs(lambda i: tasks[i].task.test),
        shifted=pairs(lambda i: tasks[i].task.shifted),
        policy=side_by_side([t.task.policy.sequences for t in tasks], width),
        gold=torch.stack([t.task.policy.gold for t in tasks]),
        unlabelled=side_by_side([t.unlabelled for t in tasks], width),
        label_noise=(config.label_noise,) * len(seeds),
        counterfactual=pairs(lambda i: exchanged(tasks[i].task.train, derive(seeds[i], "counterfactual"))),
        tasks=tuple(t.task for t in tasks),
        language_models=found["parameters"],
    )


def exchanged(pairs: PreferencePairs, seed: int) -> PreferencePairs:
    """The same pairs and labels, each answer with the other's amount of filler."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = ((s.tokens == FILLER).sum(1) for s in (pairs.chosen, pairs.rejected))
    return PreferencePairs(
        with_filler(pairs.chosen, rejected, generator),
        with_filler(pairs.rejected, chosen, generator),
        1 - pairs.shortcut_share,
        pairs.label_noise,
    )


def side_by_side(parts: list[Sequences], width: int) -> Answers:
    """Answers of all seeds, padded to one width, so that a seed's arithmetic depends on no other seed."""
    tokens = torch.stack(
        [torch.nn.functional.pad(p.tokens, (0, width - p.tokens.shape[1]), value=p.pad_token_id) for p in parts]
    )
    lengths = torch.stack([p.lengths for p in parts])
    return Answers({"tokens": tokens, "lengths": lengths}, lengths, (tokens == FILLER).sum(2).double())
