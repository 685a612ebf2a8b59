"""What a preference task is here: padded sequences, preference pairs, and policy samples with a gold reward.

Plain data on the CPU. How it is made is `synthetic.py`'s and `text.py`'s business, what is done with it the recipe's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sequences:
    """N token sequences of differing length, padded on the right.

    Attributes:
        tokens: int64 [N, L]; what stands past a sequence's length is `pad_token_id`.
        lengths: int64 [N], 1 to L.
        pad_token_id: the padding token.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    pad_token_id: int

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], pad_token_id: int) -> Sequences:
        """Pads lists of token ids.

        Raises:
            ValueError: there is no row, or an empty one.
        """
        lengths = torch.tensor([len(row) for row in rows])
        if len(rows) == 0 or lengths.min() == 0:
            raise ValueError(f"`rows` must be non-empty lists of token ids, got {len(rows)} rows, one of them empty.")
        tokens = torch.full((len(rows), int(lengths.max())), pad_token_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return cls(tokens, lengths, pad_token_id)

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, index: torch.Tensor | slice) -> Sequences:
        """The chosen rows."""
        return Sequences(self.tokens[index], self.lengths[index], self.pad_token_id)

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (int64 [N, longest]), cut to the longest of these sequences."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest) < self.lengths[:, None]
        return {"input_ids": self.tokens[:, :longest].to(device), "attention_mask": mask.long().to(device)}


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """All rows of `parts`, in order.

    Raises:
        ValueError: padding tokens differ.
    """
    if len({part.pad_token_id for part in parts}) != 1:
        raise ValueError("`parts` must share one pad_token_id, got " + str([p.pad_token_id for p in parts]) + ".")
    longest = max(part.tokens.shape[1] for part in parts)
    pad = parts[0].pad_token_id
    padded = [torch.nn.functional.pad(p.tokens, (0, longest - p.tokens.shape[1]), value=pad) for p in parts]
    return Sequences(torch.cat(padded), torch.cat([p.lengths for p in parts]), pad)


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs of answers to one prompt each, the preferred one first.

    Attributes:
        chosen: the answers labelled preferred.
        rejected: the others.
        shortcut_share: share of the pairs in which the truly better answer has more of the shortcut.
        label_noise: share of the pairs whose label is the wrong way round.
    """

    chosen: Sequences
    rejected: Sequences
    shortcut_share: float
    label_noise: float = 0.0

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, index: torch.Tensor | slice) -> PreferencePairs:
        """The chosen pairs; the shares remain those of the whole."""
        return PreferencePairs(
            self.chosen.select(index), self.rejected.select(index), self.shortcut_share, self.label_noise
        )

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Model inputs of all answers in one batch: the chosen ones, then the rejected ones."""
        return concatenate([self.chosen, self.rejected]).inputs(device)


@dataclass(frozen=True)
class PolicySamples:
    """Answers that a policy gave, for best-of-n selection.

    Attributes:
        sequences: prompts * samples rows, all samples of a prompt in a run.
        gold: fp64 [prompts, samples], the gold reward.
        shortcut: fp64 [prompts, samples], the amount of the shortcut.
    """

    sequences: Sequences
    gold: torch.Tensor
    shortcut: torch.Tensor


@dataclass(frozen=True)
class Task:
    """Everything that a run needs of a task.

    Attributes:
        name: short name for tables and plots.
        train: training pairs (noisy labels, planted shortcut).
        test: held-out pairs of the same kind, labelled by the gold reward without noise.
        shifted: held-out pairs with the shortcut reversed, labelled by the gold reward without noise.
        policy: samples for best-of-n, which go further with the shortcut than training ever did.
        vocab_size: tokens are below it.
        pad_token_id: the padding token.
        shortcut_name: what the shortcut is, in words.
        facts: measured properties of the data, for the report.
        gold: the gold reward of any sequence that begins with a prompt, fp64 [N]; None where only the task's own
            answers have one.
        prompts: the distinct prompts that a policy answers; None where answers stand alone.
        end_token_id: ends an answer; None where a policy can't generate.
        regime_of: the instruction regime of each sequence, int64 [N]; None where the task has one regime.
        regimes: names of the instruction regimes.
        shortcut_of: the amount of the shortcut in each sequence, fp64 [N]; None where it can't be read off tokens.
        unlabelled: how many and a seed to so many answers of the policy, without labels, none of them from `policy`;
            None where there are no more.
    """

    name: str
    train: PreferencePairs
    test: PreferencePairs
    shifted: PreferencePairs
    policy: PolicySamples
    vocab_size: int
    pad_token_id: int
    shortcut_name: str
    facts: dict[str, float] = field(default_factory=dict)
    gold: Callable[[Sequences], torch.Tensor] | None = None
    prompts: Sequences | None = None
    end_token_id: int | None = None
    regime_of: Callable[[Sequences], torch.Tensor] | None = None
    regimes: tuple[str, ...] = ()
    shortcut_of: Callable[[Sequences], torch.Tensor] | None = None
    unlabelled: Callable[[int, int], Sequences] | None = None


def data_facts(task_parts: dict[str, PreferencePairs]) -> dict[str, float]:
    """Sizes and measured shares of each split."""
    facts: dict[str, float] = {}
    for name, pairs in task_parts.items():
        facts[f"{name}_pairs"] = len(pairs)
        facts[f"{name}_shortcut_share"] = pairs.shortcut_share
    facts["train_label_noise"] = task_parts["train"].label_noise
    lengths = torch.cat([task_parts["train"].chosen.lengths, task_parts["train"].rejected.lengths]).double()
    facts["train_tokens_mean"], facts["train_tokens_max"] = lengths.mean().item(), lengths.max().item()
    return facts
