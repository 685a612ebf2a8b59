"""The policy: a small causal language model, its training on a task's answers, and sampling from it.

What is done with the samples (best-of-n, PPO) is for other modules. Sampling is at temperature 1 from the whole
distribution, since the divergences in `kl.py` are of exactly that distribution. A policy on a real checkpoint is the
same `PolicyModel` around another network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .tasks import Sequences, Task

Scorer = Callable[[Sequences], torch.Tensor]
"""Rewards [N] of N sequences, each a prompt and its answer."""


@dataclass(frozen=True)
class PolicyConfig:
    """A policy built from configuration, and its training.

    Attributes:
        hidden_size: of the Llama.
        intermediate_size: of its FFNs.
        num_layers: its layers.
        num_heads: attention heads.
        max_answer_tokens: longest answer, its end token included; the last position can only be the end token.
        steps: optimiser steps (AdamW, linear warm-up, then linear to zero).
        batch_size: answers a step.
        learning_rate: peak learning rate.
        warmup_steps: steps of warm-up.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_answer_tokens: int = 24
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 5e-3
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"PolicyConfig: `{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_answer_tokens < 2:
            raise ValueError(
                f"PolicyConfig: `max_answer_tokens` must be at least 2 (a token and the end), "
                f"got {self.max_answer_tokens}."
            )
        if self.hidden_size % (2 * self.num_heads) != 0:
            raise ValueError(
                f"PolicyConfig: `hidden_size` must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                f"(rotary positions turn pairs), got {self.hidden_size}."
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"PolicyConfig: `warmup_steps` must be below steps={self.steps}, got {self.warmup_steps}.")


@dataclass
class PolicyModel:
    """A causal language model as a policy over answers.

    Attributes:
        network: any causal language model of transformers.
        allowed: bool [vocabulary] on the network's device, the tokens an answer may hold; others have probability 0.
        end_token: ends an answer.
        pad_token_id: fills sequences up.
        max_answer_tokens: longest answer, its end token included. An answer that is one short of it is ended by force:
            that is no choice of the policy, so it has no log-probability and no divergence.
        losses: next-token loss of each training step, if it was trained here.
    """

    network: PreTrainedModel
    allowed: torch.Tensor
    end_token: int
    pad_token_id: int
    max_answer_tokens: int
    losses: list[float] = field(default_factory=list)

    def log_probabilities(self, sequences: Sequences) -> torch.Tensor:
        """Log-probabilities of every next token: fp32 [N, longest - 1, vocabulary]; those not allowed about -3e38.

        Position t is the distribution of token t + 1. What stands past a sequence's length is meaningless.
        """
        # no attention mask: padding stands on the right, which a causal model's earlier positions never see
        tokens = sequences.inputs(self.allowed.device)["input_ids"][:, :-1]
        return self.normalise(self.network(input_ids=tokens, use_cache=False).logits)

    def normalise(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities over the allowed tokens from logits [..., vocabulary]."""
        logits = logits.float()
        # the least finite number and not -inf: 0 * log 0 in a divergence then is 0 and not NaN
        return logits.masked_fill(~self.allowed, torch.finfo(logits.dtype).min).log_softmax(-1)

    def to(self, device: torch.device | str) -> PolicyModel:
        """Moves network and mask, in place, and returns itself."""
        self.network.to(device)
        self.allowed = self.allowed.to(device)
        return self

    def copy(self) -> PolicyModel:
        """An independent policy with equal weights."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class Rollout:
    """Answers that a policy gave, on the CPU.

    Attributes:
        sequences: prompts and answers, L the longest.
        logprobs: fp32 [N, L - 1], log-probability of token t + 1 at position t; 0 outside `mask`.
        mask: bool [N, L - 1], the positions at which the policy chose the next token.
    """

    sequences: Sequences
    logprobs: torch.Tensor
    mask: torch.Tensor

    def answer_lengths(self) -> torch.Tensor:
        """int64 [N]: tokens after the prompt, the end token included."""
        return self.sequences.lengths - 1 - self.mask.int().argmax(1)


def train_policy(task: Task, config: PolicyConfig, seed: int) -> PolicyModel:
    """Trains a Llama from random weights on the answers of `task.policy`, given their prompts.

    Args:
        task: any task with `prompts` and an `end_token_id`.
        config: sizes and training.
        seed: of the initial weights and of the data order. The global random state is left alone.

    Returns:
        The policy in eval mode. It may sample the tokens that occur in the task's answers.

    Raises:
        ValueError: the task has no prompts or end token, or an answer begins or ends with another.
    """
    if task.prompts is None or task.end_token_id is None:
        raise ValueError(
            f"`task` must have `prompts` and an `end_token_id` for a policy to learn it; {task.name!r} has not."
        )
    sequences = task.policy.sequences
    other = sequences.tokens.gather(1, sequences.lengths[:, None] - 1).squeeze(1) != task.end_token_id
    if bool(other.any()):
        raise ValueError(
            f"`task.policy.sequences` must all end in the task's end token, {task.end_token_id}; "
            f"row {int(other.nonzero()[0])} does not."
        )
    answer = answer_positions(sequences, task.prompts)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(_llama(task, config))
    policy = policy_of(task, network, config.max_answer_tokens)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(config.steps):
        batch = torch.randint(len(sequences), (config.batch_size,), generator=generator)
        chosen = sequences.select(batch)
        longest = int(chosen.lengths.max())
        logprobs = policy.log_probabilities(chosen)
        mask = answer[batch, 1:longest]
        loss = F.nll_loss(logprobs[mask], chosen.tokens[:, 1:longest][mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        policy.losses.append(loss.item())
    network.eval()
    return policy


def policy_of(task: Task, network: PreTrainedModel, max_answer_tokens: int) -> PolicyModel:
    """A language model as a policy of a task with prompts; it may say the tokens that the task's answers hold."""
    assert task.prompts is not None and task.end_token_id is not None
    sequences = task.policy.sequences
    allowed = torch.zeros(task.vocab_size, dtype=torch.bool)
    allowed[sequences.tokens[answer_positions(sequences, task.prompts)]] = True
    return PolicyModel(network, allowed, task.end_token_id, task.pad_token_id, max_answer_tokens)


def answer_positions(sequences: Sequences, prompts: Sequences) -> torch.Tensor:
    """bool [N, L]: where each sequence's answer stands, its prompt and padding left out."""
    position = torch.arange(sequences.tokens.shape[1])
    starts = prompt_lengths(sequences, prompts)
    return (position >= starts[:, None]) & (position < sequences.lengths[:, None])


def prompt_lengths(sequences: Sequences, prompts: Sequences) -> torch.Tensor:
    """int64 [N]: length of the longest prompt that each sequence begins with.

    Raises:
        ValueError: a sequence begins with none.
    """
    lengths = torch.zeros(len(sequences), dtype=torch.int64)
    for prompt, length in zip(prompts.tokens, prompts.lengths.tolist(), strict=True):
        long = (sequences.lengths >= length).nonzero().squeeze(1)
        if len(long) > 0:
            fitting = long[(sequences.tokens[long, :length] == prompt[:length]).all(1)]
            lengths[fitting] = lengths[fitting].clamp_min(length)
    without = (lengths == 0).nonzero().squeeze(1)
    if len(without) > 0:
        raise ValueError(f"`sequences` must each begin with one of `prompts`; row {int(without[0])} does not.")
    return lengths


def _llama(task: Task, config: PolicyConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=1024,
        pad_token_id=task.pad_token_id,
        bos_token_id=None,
        eos_token_id=task.end_token_id,
        tie_word_embeddings=False,
    )


def _rate(step: int, config: PolicyConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    return 1 - (step - config.warmup_steps) / (config.steps - config.warmup_steps)


@torch.no_grad()
def sample(policy: PolicyModel, prompts: Sequences, generator: torch.Generator, batch_size: int = 256) -> Rollout:
    """One answer to each prompt, at temperature 1; every answer ends in the end token.

    Args:
        policy: in eval mode.
        prompts: N of them, of any lengths; repeat one to get several answers.
        generator: on the CPU; every call draws N * (max_answer_tokens - 1) numbers from it, whatever comes out.
        batch_size: answers sampled at a time.

    Returns:
        The answers in the prompts' order.

    Raises:
        FloatingPointError: the policy's probabilities are NaN.
    """
    uniform = torch.rand(len(prompts), policy.max_answer_tokens - 1, generator=generator, dtype=torch.float64)
    rows = torch.arange(len(prompts))
    parts = [_answers(policy, prompts.select(i), uniform[i]) for i in rows.split(batch_size)]
    answers, logprobs, live = (torch.cat(column) for column in zip(*parts, strict=True))

    width = prompts.tokens.shape[1] + policy.max_answer_tokens
    place = prompts.lengths[:, None] + torch.arange(policy.max_answer_tokens)
    tokens = torch.full((len(prompts), width), policy.pad_token_id)
    tokens[:, : prompts.tokens.shape[1]] = prompts.tokens
    tokens.scatter_(1, place, answers)
    chosen = live.sum(1, keepdim=True)
    forced = (answers.gather(1, chosen - 1) != policy.end_token).squeeze(1)
    lengths = prompts.lengths + chosen.squeeze(1) + forced
    longest = int(lengths.max())
    scattered = torch.zeros(len(prompts), width).scatter_(1, place[:, :-1], logprobs)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool).scatter_(1, place[:, :-1], live)
    return Rollout(
        Sequences(tokens[:, :longest], lengths, policy.pad_token_id), scattered[:, 1:longest], mask[:, 1:longest]
    )


def _answers(policy: PolicyModel, prompts: Sequences, uniform: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Answers [N, max] padded, log-probabilities [N, max - 1], and which of these tokens the policy chose.

    Keys and values are kept from step to step: at 128 answers of up to 32 tokens by the default model that took 0.08 to
    0.13 s, forwards over whole sequences 0.56 s (one thread of a busy two-core x86 CPU).
    """
    device, count = policy.allowed.device, len(prompts)
    longest = int(prompts.lengths.max())
    # prompts are moved to the right, so that all answers start at one column
    column = torch.arange(longest) - (longest - prompts.lengths[:, None])
    tokens = prompts.tokens.gather(1, column.clamp_min(0)).masked_fill(column < 0, policy.pad_token_id).to(device)
    attention = (column >= 0).long().to(device) if bool((column < 0).any()) else None
    inputs = {"input_ids": tokens, "position_ids": column.clamp_min(0).to(device)}
    answers = torch.full((count, policy.max_answer_tokens), policy.pad_token_id, device=device)
    logprobs = torch.zeros(count, policy.max_answer_tokens - 1, device=device)
    live = torch.zeros(logprobs.shape, dtype=torch.bool, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    cache = None
    for t in range(policy.max_answer_tokens - 1):
        out = policy.network(
            **inputs, attention_mask=attention, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
        distribution = policy.normalise(out.logits[:, -1])
        # The first token whose cumulative probability exceeds the draw: never one of probability 0. The factor keeps
        # the largest draw below the whole, which rounding could otherwise make it reach.
        cumulative = distribution.double().exp().cumsum(-1)
        if not bool(cumulative[:, -1].isfinite().all()):
            raise FloatingPointError("the policy's probabilities are NaN: its weights have diverged.")
        draw = uniform[:, t, None].to(device) * (1 - 2**-52) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True)
        answers[:, t] = torch.where(alive, token.squeeze(1), policy.pad_token_id)
        logprobs[:, t] = torch.where(alive, distribution.gather(1, token).squeeze(1), 0.0)
        live[:, t] = alive
        alive = alive & (token.squeeze(1) != policy.end_token)
        if not bool(alive.any()):
            break
        inputs = {"input_ids": token, "position_ids": inputs["position_ids"][:, -1:] + 1}
        if attention is not None:
            attention = F.pad(attention, (0, 1), value=1)
    answers[alive, -1] = policy.end_token
    return answers.cpu(), logprobs.cpu(), live.cpu()
