"""How far a policy has gone from its reference: exact divergences at visited states, their sum, and its estimate.

    KL(policy || reference) of answers = E over answers of sum over t of KL(policy(. | s_t) || reference(. | s_t))

by the chain rule, s_t being the states that the policy visits. The inner divergence is summed over the vocabulary, so
that only the expectation over answers is estimated: less noise than the usual log-ratio of the sampled tokens, and
never negative (Amini, Vieira and Cotterell 2025, arXiv 2504.10637).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .policy import PolicyModel, Rollout


def token_kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last dimension, from log-probabilities; differentiable.

    Args:
        logprobs: [..., vocabulary] of p; finite, tokens without probability very negative.
        reference: the same of q.

    Returns:
        [...]
    """
    return (logprobs.exp() * (logprobs - reference)).sum(-1)


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension: [..., vocabulary] to [...]."""
    return -(logprobs.exp() * logprobs).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """A policy against its reference on the policy's own answers; each fp32 [N, L - 1], 0 outside the rollout's mask.

    Attributes:
        kl: exact divergence at the visited state; its row sums' mean estimates the answers' KL.
        log_ratio: log-probability of the chosen token less its reference's; the same expectation, and noisier.
        logprobs: log-probability of the chosen token.
        entropy: of the policy at the visited state.
    """

    kl: torch.Tensor
    log_ratio: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor

    def sequence_kl(self) -> float:
        """Exact inner sums, averaged over answers: nats per answer."""
        return self.kl.double().sum(1).mean().item()

    def sequence_kl_estimate(self) -> float:
        """The Monte Carlo estimate from the chosen tokens alone: nats per answer."""
        return self.log_ratio.double().sum(1).mean().item()

    def sequence_entropy(self) -> float:
        """Entropy of the answers, estimated as the divergence is: nats per answer."""
        return self.entropy.double().sum(1).mean().item()


@torch.no_grad()
def divergence(policy: PolicyModel, reference: PolicyModel, rollout: Rollout, batch_size: int = 256) -> Divergence:
    """Measures `policy` against `reference` on answers.

    Args:
        policy: in eval mode. Its own samples give the KL(policy || reference).
        reference: a policy over the same tokens with the same `allowed`.
        rollout: N answers.
        batch_size: answers a forward.

    Returns:
        Tensors on the CPU.

    Raises:
        ValueError: the policies may say different tokens: the divergence would be infinite.
    """
    if not torch.equal(policy.allowed, reference.allowed):
        raise ValueError("`policy` and `reference` must allow the same tokens; give both the same `allowed`.")
    shape = rollout.mask.shape
    columns = [torch.zeros(shape) for _ in range(4)]
    for rows in torch.arange(shape[0]).split(batch_size):
        chosen = rollout.sequences.select(rows)
        width = int(chosen.lengths.max()) - 1
        token = chosen.tokens[:, 1 : width + 1, None].to(policy.allowed.device)
        p, q = policy.log_probabilities(chosen), reference.log_probabilities(chosen)
        picked = p.gather(2, token).squeeze(2)
        values = (token_kl(p, q), picked - q.gather(2, token).squeeze(2), picked, entropy(p))
        for column, value in zip(columns, values, strict=True):
            column[rows, :width] = value.cpu().masked_fill(~rollout.mask[rows, :width], 0.0)
    return Divergence(*columns)
