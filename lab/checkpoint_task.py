"""A task made of checkpoints and data by name: prompts, preference pairs, and the policy's answers with gold rewards.

The shortcut that is watched is length. What the policy and the gold model made is kept in a file, so that a resumed
study goes on with the same data on devices too whose sampling does not repeat bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .checkpoint_config import CheckpointTaskConfig
from .checkpoints import GoldModel, PromptTemplate, autocast, load_columns, load_policy, load_prompt_template
from .files import kept
from .policy import PolicyModel, Rollout, sample
from .tasks import PolicySamples, PreferencePairs, Sequences, Task
from .tasks.base import data_facts

OnStep = Callable[[str, int, int], None]


class Prompts:
    """Instructions that were given out, found again by the tokens that a sequence begins with."""

    def __init__(self, prompt_template: PromptTemplate) -> None:
        self.prompt_template = prompt_template
        self._texts: dict[bytes, str] = {}
        self._lengths: set[int] = set()

    def add(self, tokens: Sequence[int], instruction: str) -> None:
        """Remembers one."""
        self._texts[torch.tensor(tokens).numpy().tobytes()] = instruction
        self._lengths.add(len(tokens))

    def find(self, sequences: Sequences) -> tuple[list[str], torch.Tensor]:
        """The instruction of each sequence, and int64 [N], the length of its prompt: the longest that fits.

        Raises:
            ValueError: a sequence begins with none.
        """
        lengths = sorted(self._lengths, reverse=True)
        texts, found = [], []
        for row, total in zip(sequences.tokens.contiguous().numpy(), sequences.lengths.tolist(), strict=True):
            for length in lengths:
                text = self._texts.get(row[:length].tobytes()) if length <= total else None
                if text is not None:
                    texts.append(text)
                    found.append(length)
                    break
            else:
                raise ValueError("`sequences` must each begin with a prompt of the task; one does not.")
        return texts, torch.tensor(found, dtype=torch.int64)

    def answers(self, sequences: Sequences) -> tuple[list[str], list[str]]:
        """Instructions and answers as text."""
        texts, starts = self.find(sequences)
        rows = zip(sequences.tokens.tolist(), starts.tolist(), sequences.lengths.tolist(), strict=True)
        return texts, self.prompt_template.answer_texts([row[start:end] for row, start, end in rows])


class CheckpointSource:
    """what a task on checkpoints needs, loaded when it is first asked for: tokenizer, policy, gold model, task.

    Args:
        config: the task.
        derive: seeds by name.
        device: where models run.
        folder: where what was sampled and judged is kept; None keeps it in memory alone.
        on_step: told how far sampling is.
    """

    def __init__(
        self,
        config: CheckpointTaskConfig,
        derive: Callable[..., int],
        device: str,
        folder: Path | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.config, self.derive, self.device, self.folder = config, derive, device, folder
        self.on_step = on_step or (lambda stage, done, total: None)
        self.prompt_template = load_prompt_template(config)
        self.prompts = Prompts(self.prompt_template)
        self._policy: PolicyModel | None = None
        self._gold: GoldModel | None = None
        with autocast(config.dtype, device):
            self.task = self._task()

    def policy(self) -> PolicyModel:
        """The policy, the same object at every call."""
        if self._policy is None:
            self._policy = load_policy(self.config, self.prompt_template, self.device)
        return self._policy

    def gold(self, sequences: Sequences) -> torch.Tensor:
        """Gold rewards of answers to the task's prompts, fp64 [N]."""
        if self._gold is None:
            self._gold = GoldModel(self.config.gold, self.device, self.config.dtype)
        return self._gold(*self.prompts.answers(sequences))

    def length_of(self, sequences: Sequences) -> torch.Tensor:
        """Tokens of each answer, its end token included, fp64 [N]."""
        return (sequences.lengths - self.prompts.find(sequences)[1]).double()

    def prompt_texts(self) -> list[str]:
        """The task's prompts as the policy reads them."""
        return [self.prompt_template.text(instruction) for instruction in self.prompts.find(self.task.prompts)[0]]

    # ---- the task ----------------------------------------------------------------------------------------------

    def _task(self) -> Task:
        config, prompt_template = self.config, self.prompt_template
        wanted = config.policy_prompts + (0 if config.pairs else config.train_pairs + config.test_pairs)
        pad = prompt_template.tokenizer.pad_token_id
        prompts = Sequences.from_lists(self._prompts(wanted), pad)
        ours = prompts.select(slice(0, config.policy_prompts))
        made = self._kept(lambda: self._make(prompts))
        if config.pairs:
            sides = self._data_pairs()
        else:
            sides = made["first"], made["second"], made["lead"]
        train, test = self._pairs(*sides)
        shorter = self.length_of(test.chosen) < self.length_of(test.rejected)
        shifted = dataclasses.replace(test.select(shorter), shortcut_share=0.0)
        shape = (config.selection_prompts, config.samples)
        answers = made["answers"]
        samples = PolicySamples(answers, made["gold"].view(shape), self.length_of(answers).view(shape))
        return Task(
            name=f"answers of {config.policy}",
            train=train,
            test=test,
            shifted=shifted,
            policy=samples,
            vocab_size=len(prompt_template.tokenizer),
            pad_token_id=pad,
            shortcut_name="tokens",
            facts=data_facts({"train": train, "test": test, "shifted": shifted}),
            gold=self.gold,
            prompts=ours,
            end_token_id=prompt_template.tokenizer.eos_token_id,
            regime_of=lambda sequences: torch.zeros(len(sequences), dtype=torch.int64),
            regimes=("all",),
            shortcut_of=self.length_of,
        )

    def _prompts(self, count: int) -> list[list[int]]:
        """Prompts of `count` different instructions, in random order, all short enough."""
        config = self.config
        columns = [name for name in (config.prompts.column, config.prompts.input_column) if name is not None]
        found = load_columns("task.prompts", config.prompts, columns)
        texts = ["\n\n".join(part for part in row if part) for row in zip(*found, strict=True)]
        texts = [text for text in dict.fromkeys(texts) if text]
        generator = torch.Generator().manual_seed(self.derive("prompts"))
        order = torch.randperm(len(texts), generator=generator).tolist()
        tokens = self.prompt_template.tokens(texts)
        fitting = [i for i in order if 0 < len(tokens[i]) <= config.max_prompt_tokens]
        if len(fitting) < count:
            raise ValueError(
                f"`task.prompts` must have {count} different prompts of at most {config.max_prompt_tokens} tokens (for "
                f"pairs and policies, each its own), and {config.prompts.name} has {len(fitting)}; ask for fewer, or "
                "raise `task.max_prompt_tokens`."
            )
        for i in fitting[:count]:
            self.prompts.add(tokens[i], texts[i])
        return [tokens[i] for i in fitting[:count]]

    def _make(self, prompts: Sequences) -> dict:
        """Answers for best-of-n and, without a data set of pairs, two answers to each other prompt; all with gold."""
        config = self.config
        selection = torch.arange(config.selection_prompts).repeat_interleave(config.samples)
        answers = self._sample(prompts.select(selection), "selection").sequences
        made = {"answers": answers, "gold": self.gold(answers)}
        if config.pairs is None:
            rest = prompts.select(slice(config.policy_prompts, None))
            both = torch.arange(len(rest)).repeat_interleave(2)
            sampled = self._sample(rest.select(both), "pairs").sequences
            gold = self.gold(sampled)
            made |= {"first": sampled.select(slice(0, None, 2)), "second": sampled.select(slice(1, None, 2))}
            made["lead"] = gold[0::2] - gold[1::2]
        return made

    def _sample(self, prompts: Sequences, what: str) -> Rollout:
        self.on_step(f"answers for {what}", 0, 1)
        generator = torch.Generator().manual_seed(self.derive("answers", what))
        return sample(self.policy(), prompts, generator, self.config.sample_batch)

    def _data_pairs(self) -> tuple[Sequences, Sequences, torch.Tensor]:
        """The data set's pairs in random order as many as are needed, each preferred answer first."""
        config, prompt_template = self.config, self.prompt_template
        columns = (config.pairs.prompt, config.pairs.chosen, config.pairs.rejected)
        rows = list(zip(*load_columns("task.pairs", config.pairs, columns), strict=True))
        generator = torch.Generator().manual_seed(self.derive("pairs"))
        sides: tuple[list[list[int]], list[list[int]]] = ([], [])
        wanted = config.train_pairs + config.test_pairs
        for i in torch.randperm(len(rows), generator=generator).tolist():
            instruction = rows[i][0]
            (start,) = prompt_template.tokens([instruction])
            answers = prompt_template.answer_tokens([_answer(answer) for answer in rows[i][1:]])
            longest = max(map(len, answers))
            if len(start) > config.max_prompt_tokens or longest > config.max_answer_tokens or answers[0] == answers[1]:
                continue
            self.prompts.add(start, instruction)
            for side, answer in zip(sides, answers, strict=True):
                side.append([*start, *answer])
            if len(sides[0]) == wanted:
                pad = prompt_template.tokenizer.pad_token_id
                first, second = (Sequences.from_lists(side, pad) for side in sides)
                return first, second, torch.ones(wanted, dtype=torch.float64)
        raise ValueError(
            f"`task.pairs` must have {wanted} pairs with prompts of at most {config.max_prompt_tokens} and answers of "
            f"at most {config.max_answer_tokens} tokens, and {config.pairs.name} has {len(sides[0])}; ask for fewer, "
            "or raise these lengths."
        )

    def _pairs(
        self, first: Sequences, second: Sequences, lead: torch.Tensor
    ) -> tuple[PreferencePairs, PreferencePairs]:
        """Training pairs with flipped labels and test pairs without, of answers and by how much the first is better."""
        config = self.config
        decided = lead != 0  # ties have no label
        better = lead > 0
        longer = torch.where(better, 1, -1) * (self.length_of(first) - self.length_of(second)) > 0
        training = torch.arange(len(lead)) < config.train_pairs
        noisy = (decided & training).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self.derive("labels"))
        order = noisy[torch.randperm(len(noisy), generator=generator)]
        flipped = torch.zeros(len(lead), dtype=torch.bool)
        flipped[order[: round(len(noisy) * config.label_noise)]] = True
        made = []
        for name, part in (("train", decided & training), ("test", decided & ~training)):
            if not bool(part.any()):
                raise ValueError(
                    f"the gold model {config.gold.name} must tell some answers apart, and rates the two answers of "
                    f"every {name} pair alike; see whether it reads them (`task.gold.template`)."
                )
            index = part.nonzero().squeeze(1)
            label = (better ^ flipped)[index]
            chosen, rejected = _ordered(first.select(index), second.select(index), label)
            share = longer[index].double().mean().item()
            made.append(PreferencePairs(chosen, rejected, share, flipped[index].double().mean().item()))
        return made[0], made[1]

    def _kept(self, make: Callable[[], dict]) -> dict:
        """What `make` gives, from its file where there is one: sequences and tensors by name."""
        if self.folder is None:
            return make()
        plain = json.dumps([dataclasses.asdict(self.config), self.device], sort_keys=True)
        path = self.folder / f"task-{hashlib.sha256(plain.encode()).hexdigest()[:12]}.pt"

        def flat() -> dict:
            return {k: (v.tokens, v.lengths) if isinstance(v, Sequences) else v for k, v in make().items()}

        pad = self.prompt_template.tokenizer.pad_token_id
        return {k: Sequences(*v, pad) if isinstance(v, tuple) else v for k, v in kept(path, flat).items()}


def _ordered(first: Sequences, second: Sequences, label: torch.Tensor) -> tuple[Sequences, Sequences]:
    """Chosen and rejected: the first where `label`, else the second."""
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    pad = first.pad_token_id
    tokens = [torch.nn.functional.pad(s.tokens, (0, width - s.tokens.shape[1]), value=pad) for s in (first, second)]
    swap = label[:, None]
    sides = (
        (torch.where(swap, tokens[0], tokens[1]), torch.where(label, first.lengths, second.lengths)),
        (torch.where(swap, tokens[1], tokens[0]), torch.where(label, second.lengths, first.lengths)),
    )
    chosen, rejected = (Sequences(t, n, pad) for t, n in sides)
    return chosen, rejected


def _answer(value: object) -> str:
    """The answer of a data set's cell: text, or the last of its messages."""
    return value if isinstance(value, str) else value[-1]["content"]
