"""What a regime gives to the arms: the data of a block of seeds side by side, a pretrained start, and the network.

This is the interface of a regime. A new one needs a `Network` (which reads its own features and knows its FFNs) and a
function that makes a `Block`; arms, training, measures, tables and report are those of every regime.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tasks import Task
from .replicas import FFN, Parameters

Features = dict[str, Tensor]
"""What a network reads of answers, [R, n, ...] each."""


MixtureFFN = Callable[[int, Tensor, Tensor], Tensor]
"""In an FFN's place: called with its number, its input [R, N, H] and the live rows, bool [R, N]; gives [R, N, H]."""


class Network(ABC):
    """The forward of one architecture, replicas side by side.

    Attributes:
        ffns: the FFNs, from first to last.
        linears: names of the parameters of all linear layers of the body, FFNs included: what become experts under
            `experts_in: linear`.
        head: names of the reward head's parameters.
        undecayed: names of the parameters that AdamW does not decay: norms and biases, as transformers' Trainer has it.
        hidden_size: H.
    """

    ffns: tuple[FFN, ...]
    linears: tuple[str, ...]
    head: tuple[str, ...]
    undecayed: frozenset[str]
    hidden_size: int

    @abstractmethod
    def rewards(
        self,
        parameters: Parameters,
        features: Features,
        shared_weight: float = 0.0,
        mixture: MixtureFFN | None = None,
    ) -> Tensor:
        """Rewards of answers.

        Args:
            parameters: [R, ...]; expert tensors [R, E, ...], for which `replicas.linear` is used throughout.
            features: [R, n, ...] of n answers of each replica; where there are experts ordered by expert, equally many
                of each.
            shared_weight: of the shared expert beside those, as in `replicas.ffn`.
            mixture: in the FFNs' place; it must then be given every token's row.

        Returns:
            [R, n].
        """

    @abstractmethod
    def forward_flops(self, length: Tensor, extra_ffns: float = 0.0) -> Tensor:
        """Operations a token of one forward, counted as `lab.costs` does.

        Args:
            length: mean length of each seed's answers, fp64 [S].
            extra_ffns: FFNs that each token passes beyond the dense model's one a layer, on average.
        """

    @abstractmethod
    def fresh_head(self, generators: list[torch.Generator]) -> Parameters:
        """A fresh reward head from each generator: those of the parameters that the head has."""

    def expert_names(self, experts_in: str) -> tuple[str, ...]:
        """Parameters that become experts: of `"ffn"`, `"linear"` or `"all"`, as `training.Sequencing` has them."""
        if experts_in == "ffn":
            return tuple(n for one in self.ffns for n in one.names)
        return self.linears + (self.head if experts_in == "all" else ())

    def parameter_count(self, parameters: Parameters) -> int:
        """Parameters of one replica."""
        return sum(value[0].numel() for value in parameters.values())


@dataclass(frozen=True)
class Answers:
    """Answers of S seeds side by side.

    Attributes:
        features: [S, n, ...] each, or [1, n, ...] where all seeds read the same.
        lengths: int64 [S, n], tokens.
        shortcut: fp64 [S, n], the amount of the shortcut in each.
    """

    features: Features
    lengths: Tensor
    shortcut: Tensor

    def __len__(self) -> int:
        return self.lengths.shape[1]

    def first(self, count: int) -> Answers:
        """The first answers of each seed."""
        return Answers(
            {name: value[:, :count] for name, value in self.features.items()},
            self.lengths[:, :count],
            self.shortcut[:, :count],
        )

    def take(self, seeds: Tensor, index: Tensor) -> Features:
        """Features of chosen answers.

        Args:
            seeds: int64 [R], whose answers each replica reads.
            index: int64 [R, m].
        """
        return {
            name: value[(seeds if value.shape[0] > 1 else torch.zeros_like(seeds))[:, None], index]
            for name, value in self.features.items()
        }


@dataclass(frozen=True)
class Pairs:
    """Preference pairs of S seeds, the preferred answer first.

    Attributes:
        chosen: n answers a seed.
        rejected: n answers a seed.
    """

    chosen: Answers
    rejected: Answers

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, seeds: Tensor, index: Tensor) -> Features:
        """Features [R, 2m, ...] of pairs [R, m]: both answers of a pair beside each other, the preferred one first."""
        chosen, rejected = self.chosen.take(seeds, index), self.rejected.take(seeds, index)
        return {name: torch.stack([chosen[name], rejected[name]], 2).flatten(1, 2) for name in chosen}


@dataclass(frozen=True)
class Block:
    """A block of seeds of one regime.

    Attributes:
        seeds: the seeds, S of them.
        network: the forward.
        start: where every arm starts, [S, ...]: each seed's pretrained backbone with a fresh head, or a trained model.
        train: training pairs, labels as noisy as the regime has them.
        test: held-out pairs of the same kind, labelled by gold.
        shifted: held-out pairs with the shortcut reversed, labelled by gold.
        policy: the policy's answers, prompts * samples a seed, a prompt's in a run.
        gold: fp64 [S, prompts, samples].
        unlabelled: answers without labels, for distillation.
        label_noise: share of each seed's training pairs that are labelled wrongly, for calibration.
        counterfactual: the training pairs with the shortcut of both answers exchanged, the same labels; None where the
            shortcut can't be edited.
        tasks: each seed's task, where policies can be trained against rewards; None elsewhere.
        language_models: the pretrained backbones with their language heads, there too: they answer as the policy does.
    """

    seeds: tuple[int, ...]
    network: Network
    start: Parameters
    train: Pairs
    test: Pairs
    shifted: Pairs
    policy: Answers
    gold: Tensor
    unlabelled: Answers
    label_noise: tuple[float, ...]
    counterfactual: Pairs | None = None
    tasks: tuple[Task, ...] | None = None
    language_models: Parameters | None = None

    def without_labels(self, texts: str, count: int = 0) -> Answers:
        """Answers that distillation scores.

        Args:
            texts: `"policy"`, answers of the policy that stand in no pair; `"pairs"`, those of the training pairs.
            count: only the first so many; 0: all.
        """
        found = self.unlabelled if texts == "policy" else joined(self.train.chosen, self.train.rejected)
        return found if not count else found.first(count)

    @property
    def length(self) -> Tensor:
        """Mean length of each seed's training answers, fp64 [S]."""
        return torch.cat([self.train.chosen.lengths, self.train.rejected.lengths], 1).double().mean(1)

    def with_counterfactual(self) -> Pairs:
        """The training pairs, and after them those with the shortcut exchanged.

        Raises:
            ValueError: the shortcut can't be edited in this regime.
        """
        if self.counterfactual is None:
            raise ValueError("this regime has no counterfactual edits of its shortcut; leave the arm out of it.")
        return Pairs(
            joined(self.train.chosen, self.counterfactual.chosen),
            joined(self.train.rejected, self.counterfactual.rejected),
        )


def joined(first: Answers, second: Answers) -> Answers:
    """Both, one after the other."""
    return dataclasses.replace(
        first,
        features={name: torch.cat([value, second.features[name]], 1) for name, value in first.features.items()},
        lengths=torch.cat([first.lengths, second.lengths], 1),
        shortcut=torch.cat([first.shortcut, second.shortcut], 1),
    )
