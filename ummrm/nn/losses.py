"""Losses of a reward model: the preference loss, and the router's auxiliary losses of a whole network.

Auxiliary losses are read from the `ForwardStatistics` that each `UpcycledFFN` kept of its last forward
(docs/method.md); they are means over layers of quantities over live tokens, taken over all data-parallel processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .merging_ffn import merging_ffns
from .parallel import sum_over_processes
from .router import ForwardStatistics
from .upcycled_ffn import UpcycledFFN, upcycled_ffns


def preference_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Bradley-Terry loss of pairs: mean of `-log sigmoid(chosen - rejected - margin)`.

    Args:
        chosen: rewards of the preferred answers, any shape.
        rejected: rewards of the others, same shape.
        margin: by how much the preferred reward should lead, a number or a tensor of the same shape.

    Returns:
        A scalar in fp32 (fp64 for fp64 rewards).

    Raises:
        ValueError: shapes differ or there is no pair.
    """
    if chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(
            "`chosen` and `rejected` must have the same, non-empty shape, one reward per pair, got "
            f"{list(chosen.shape)} and {list(rejected.shape)}."
        )
    if torch.is_tensor(margin) and margin.dim() > 0 and margin.shape != chosen.shape:
        raise ValueError(
            f"`margin` must be a number or have the rewards' shape {list(chosen.shape)}, got {list(margin.shape)}."
        )
    difference = chosen - rejected
    if difference.dtype in (torch.float16, torch.bfloat16):
        difference = chosen.float() - rejected.float()
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference).mean()


def load_balancing_loss(tokens_per_expert: torch.Tensor, mean_prob: torch.Tensor) -> torch.Tensor:
    """Switch load-balancing loss `E * sum_e f_e P_e` (arXiv 2101.03961, eq. 4): 1 when balanced, 0 without tokens.

    Args:
        tokens_per_expert: [..., E] slots sent to each expert, any dtype.
        mean_prob: [..., E] mean router probability; the gradient flows through it alone.

    Returns:
        [...] losses.
    """
    counts = tokens_per_expert.to(mean_prob.dtype)
    fractions = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return mean_prob.shape[-1] * (fractions * mean_prob).sum(-1)


def cv_squared_loss(mean_prob: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of the experts' mean probability (arXiv 1701.06538, eq. 7; XFT's option).

    Args:
        mean_prob: [..., E].

    Returns:
        [...] losses: 0 when balanced, and without tokens.
    """
    mean = mean_prob.mean(-1)
    variance = mean_prob.var(-1, correction=0)
    return variance / mean.square().clamp_min(torch.finfo(mean_prob.dtype).tiny)


@dataclass(frozen=True)
class RoutingReport:
    """What one layer's last forward says about routing, over live tokens and all data-parallel processes.

    Attributes:
        loss: [], the weighted auxiliary loss, with the router's gradient.
        load_balancing: [], the configured balancing loss without its coefficient, detached.
        z: [], the router z-loss without its coefficient, detached.
        fractions: [E], each expert's share of the slots (zeros if no token is live).
        shared_weight: [], mean gate weight of the shared experts (0 if no token is live).
        live_tokens: [].
    """

    loss: torch.Tensor
    load_balancing: torch.Tensor
    z: torch.Tensor
    fractions: torch.Tensor
    shared_weight: torch.Tensor
    live_tokens: torch.Tensor


def auxiliary_loss(model: nn.Module, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The weighted auxiliary losses of a network's last forward: add it to the preference loss.

    `mean over layers of (balancing_loss_coef * balancing loss + z_loss_coef * z-loss)`, with the coefficients of each
    layer's `UpcycleConfig`. A layer whose tokens are all masked counts as 0.

    Args:
        model: any network with `UpcycledFFN` modules; one in its merge phase, or assigned by sequence, has no router
            and gives 0.
        group: data-parallel process group when torch.distributed is initialised; None is the default group.

    Returns:
        A scalar tensor with the routers' gradient.

    Raises:
        TypeError: the network holds no upcycled FFN.
        RuntimeError: no forward has been run, or it kept no gradient for the router (reentrant checkpointing).
    """
    reports = routing_reports(model, group)
    if not reports:
        held = merging_ffns(model) or upcycled_ffns(model)
        return torch.zeros((), device=next(next(iter(held.values())).parameters()).device)
    return torch.stack([report.loss for report in reports.values()]).mean()


def share_of_step(labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None, shifted: bool):
    """How much of an optimizer step one batch is, by its labels, where the trainer says how many the step has.

    transformers' Trainer then sums the batches' losses instead of averaging them, each divided by the labels of the
    whole step; an auxiliary loss of each batch must be scaled alike, or it counts once for every accumulated batch.

    Args:
        labels: the batch's, [batch] or [batch, sequence], -100 where there is none; None counts as the whole step.
        num_items_in_batch: labels of the whole step, over all processes; None if the trainer averages.
        shifted: whether a sequence's first label predicts nothing, as in causal language modelling.
    """
    if labels is None or num_items_in_batch is None:
        return 1
    counted = labels[..., 1:] if shifted else labels
    return counted.ne(-100).sum() / num_items_in_batch


def routing_reports(model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, RoutingReport]:
    """`auxiliary_loss` layer by layer, with what goes into it; one collective for all layers.

    Args:
        model: as in `auxiliary_loss`.
        group: as in `auxiliary_loss`.

    Returns:
        FFN name to report, on the first layer's device; empty for a network without routers.

    Raises:
        TypeError: the network holds no upcycled FFN.
        RuntimeError: no forward has been run, or it kept no gradient for the router (reentrant checkpointing).
    """
    ffns = upcycled_ffns(model)
    if not ffns:
        if not merging_ffns(model):
            raise TypeError(
                f"`model` must hold UpcycledFFN modules, got a {type(model).__name__} with none; "
                "call ummrm.upcycle(model, config) first."
            )
        return {}
    ffns = {name: ffn for name, ffn in ffns.items() if ffn.router is not None}
    if not ffns:
        return {}
    statistics = {name: ffn.statistics for name, ffn in ffns.items() if ffn.statistics is not None}
    missing = [name for name in ffns if name not in statistics]
    if missing:
        raise RuntimeError(
            f"auxiliary_loss reads the last forward's routing statistics, and {', '.join(missing)} has run none; "
            "call the model first."
        )
    for name, ffn in ffns.items():
        _check_gradient(name, ffn, statistics[name])
    packed = [_packed(s) for s in statistics.values()]
    device = packed[0].device
    summed = sum_over_processes(torch.cat([p.to(device) for p in packed]), group).split([len(p) for p in packed])
    return {name: _report(ffn, total) for (name, ffn), total in zip(ffns.items(), summed, strict=True)}


def _check_gradient(name: str, ffn: UpcycledFFN, statistics: ForwardStatistics) -> None:
    assert ffn.router is not None
    wants = ffn.training and torch.is_grad_enabled() and ffn.router.weight.requires_grad
    if wants and not statistics.mean_prob.requires_grad:
        raise RuntimeError(
            f"the routing statistics of {name} carry no gradient although its router is trained: the forward ran "
            "without autograd, as reentrant activation checkpointing does. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, and no torch.no_grad() around the forward.'
        )


def _packed(s: ForwardStatistics) -> torch.Tensor:
    """A layer's statistics as sums over live tokens, which processes can add up: [E] + [E] + 3 numbers."""
    counts = s.tokens_per_expert.to(s.mean_prob.dtype)
    live = counts.sum() / s.top_k
    shared = s.shared_weight.sum().to(counts.dtype) - (s.shared_weight.numel() - live)  # a masked token's weight is 1
    return torch.cat([counts, s.mean_prob * live, torch.stack([s.mean_z * live, shared, live])])


def _report(ffn: UpcycledFFN, total: torch.Tensor) -> RoutingReport:
    config, num_experts = ffn.config, ffn.config.num_experts
    counts, prob_sum, rest = total.split([num_experts, num_experts, 3])
    z_sum, shared_sum, live_tokens = rest.unbind()
    live = live_tokens.clamp_min(1)
    mean_prob, z = prob_sum / live, z_sum / live
    if config.balancing_loss == "switch":
        balancing = load_balancing_loss(counts, mean_prob)
    else:
        balancing = cv_squared_loss(mean_prob)
    return RoutingReport(
        config.balancing_loss_coef * balancing + config.z_loss_coef * z,
        balancing.detach(),
        z.detach(),
        (counts / counts.sum().clamp_min(1)).detach(),
        (shared_sum / live).detach(),
        live_tokens.detach(),
    )
