"""What a reward model costs: floating-point operations of training, parameters kept for serving.

Counted from the parameters, as Kaplan et al. (arXiv 2001.08361) do: a forward takes 2 operations a token for each
matrix weight that the token meets, attention 4 * length * hidden more a layer; a training step takes three forwards.
Counts are for live tokens. Time is measured elsewhere.
"""

from __future__ import annotations

from torch import nn

from ummrm import UpcycledFFN
from ummrm.nn.merging_ffn import merging_ffns
from ummrm.nn.upcycled_ffn import upcycled_ffns

BACKWARD = 2  # a backward takes two forwards: one for the inputs, one for the weights


def forward_flops(model: nn.Module, length: float) -> float:
    """Operations a token of one forward.

    Args:
        model: a Hugging Face sequence classifier, dense, upcycled or in its merge phase (then as the merged model).
        length: mean length of the sequences.
    """
    config = model.config
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ffns = [*upcycled_ffns(model).values(), *merging_ffns(model).values()]
    special = {id(p) for ffn in ffns for p in ffn.parameters()}
    plain = sum(
        p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings and id(p) not in special
    )
    weights = plain + sum(_active_weights(ffn) for ffn in ffns)
    return 2 * weights + 4 * length * config.hidden_size * config.num_hidden_layers


def training_flops(model: nn.Module, tokens: float, length: float) -> float:
    """Operations of training on `tokens` tokens, all steps together."""
    return (1 + BACKWARD) * forward_flops(model, length) * tokens


def merging_flops(model: nn.Module, steps: int) -> float:
    """Operations beyond the dense forward and backward that learning merge weights takes.

    Each step sums all experts twice (the backward merges again) and takes one inner product with each expert.
    """
    banks = [bank for ffn in merging_ffns(model).values() for bank in (ffn.experts, ffn.shared_experts)]
    weights = sum(t.numel() for bank in banks for t in bank.tensors().values() if t.dim() == 3)
    return 6.0 * weights * steps


def _active_weights(ffn: nn.Module) -> int:
    """Matrix weights that one token meets in a mixture (all experts are of one size), or in its merged FFN."""
    one = sum(t[0].numel() for t in ffn.experts.tensors().values() if t.dim() == 3)
    if not isinstance(ffn, UpcycledFFN):
        return one
    active = ffn.config.num_experts_per_tok + ffn.config.num_shared_experts
    return active * one + sum(p.numel() for p in ffn.router.parameters())
