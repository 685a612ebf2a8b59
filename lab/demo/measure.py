"""Measurements of reward models: rewards, accuracy, expert specialisation, forward latency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bench.timing import noise, side_by_side, wall
from ummrm import UpcycledFFN, preference_loss
from ummrm.nn import Experts
from ummrm.nn.upcycled_ffn import upcycled_ffns
from ummrm.ops.reference import ACTIVATIONS

from ..tasks import PreferencePairs, Sequences


@torch.no_grad()
def rewards_of(
    model: nn.Module, sequences: Sequences, batch_size: int, on_batch: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Rewards of sequences, batched by length.

    Args:
        model: in eval mode.
        sequences: N of them.
        batch_size: sequences a forward.
        on_batch: called with the number of sequences after each forward.

    Returns:
        fp64 [N] on the CPU, in the order of `sequences`.
    """
    device = next(model.parameters()).device
    order = sequences.lengths.argsort(stable=True)
    rewards = torch.empty(len(sequences), dtype=torch.float64)
    for index in order.split(batch_size):
        rewards[index] = model(**sequences.select(index).inputs(device)).logits.squeeze(-1).double().cpu()
        if on_batch is not None:
            on_batch(len(index))
    return rewards


@dataclass(frozen=True)
class Accuracy:
    """Preference accuracy over pairs; a tie counts half.

    Attributes:
        value: share of pairs whose chosen answer scores higher.
        standard_error: binomial, over pairs; it says nothing about other seeds.
    """

    value: float
    standard_error: float


def accuracy(model: nn.Module, pairs: PreferencePairs, batch_size: int) -> Accuracy:
    """Share of pairs that `model` (in eval mode) orders as they are labelled."""
    return share_right(rewards_of(model, pairs.chosen, batch_size), rewards_of(model, pairs.rejected, batch_size))


def share_right(chosen: torch.Tensor, rejected: torch.Tensor) -> Accuracy:
    """Share of pairs whose chosen answer has the higher score; both [pairs]."""
    value = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()
    return Accuracy(value, math.sqrt(value * (1 - value) / len(chosen)))


def mean_loss(model: nn.Module, pairs: PreferencePairs, batch_size: int) -> float:
    """Preference loss over all pairs, with the model in eval mode."""
    chosen, rejected = (rewards_of(model, answers, batch_size) for answers in (pairs.chosen, pairs.rejected))
    return preference_loss(chosen, rejected).item()


# ---- experts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialisation:
    """How far the routed experts of a model have grown apart; each a dict from FFN name, means over expert pairs.

    Attributes:
        weight_distance: Frobenius distance of two experts' weights over the experts' mean norm.
        disagreement: distance of two experts' outputs over the experts' mean output norm, mean over held-out tokens.
    """

    weight_distance: dict[str, float]
    disagreement: dict[str, float]

    def mean(self) -> tuple[float, float]:
        """Both measures averaged over layers."""
        return (statistics.fmean(self.weight_distance.values()), statistics.fmean(self.disagreement.values()))


@torch.no_grad()
def specialisation(moe: nn.Module, sequences: Sequences, batch_size: int) -> Specialisation:
    """Measures how different the routed experts are; a model with one routed expert gives 0.

    Args:
        moe: a network with `UpcycledFFN` modules, in eval mode.
        sequences: held-out input.
        batch_size: sequences a forward.
    """
    ffns = upcycled_ffns(moe)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in ffns}

    def keep(name: str):
        def hook(ffn: UpcycledFFN, args: tuple) -> None:
            flat = args[0].reshape(-1, ffn.spec.hidden_size)
            inputs[name].append(flat if ffn.token_mask is None else flat[ffn.token_mask.reshape(-1)])

        return hook

    handles = [ffn.register_forward_pre_hook(keep(name)) for name, ffn in ffns.items()]
    try:
        rewards_of(moe, sequences, batch_size)
    finally:
        for handle in handles:
            handle.remove()
    weights, outputs = {}, {}
    for name, ffn in ffns.items():
        flat = torch.cat([t.flatten(1).float() for t in ffn.experts.tensors().values()], dim=1)
        weights[name] = _mean_pair_distance(flat[:, None])
        tokens = torch.cat(inputs[name])
        outputs[name] = _mean_pair_distance(
            torch.stack([expert_output(ffn.experts, e, tokens) for e in range(ffn.config.num_experts)])
        )
    return Specialisation(weights, outputs)


def expert_output(experts: Experts, index: int, x: torch.Tensor) -> torch.Tensor:
    """One expert alone: x [T, H] to [T, H]."""
    spec, tensors = experts.spec, {name: t[index] for name, t in experts.tensors().items()}
    z = F.linear(x, tensors["up"], tensors.get("up_bias"))
    activation = ACTIVATIONS[spec.activation]
    if spec.glu:
        gate, up = z.chunk(2, dim=-1)
        z = activation(gate) * up
    else:
        z = activation(z)
    return F.linear(z, tensors["down"], tensors.get("down_bias"))


def _mean_pair_distance(x: torch.Tensor) -> float:
    """x [E, N, D]: mean over rows and expert pairs of the distance, over the experts' mean norm of the row."""
    experts = x.shape[0]
    if experts < 2:
        return 0.0
    norm = x.norm(dim=-1).mean(0).clamp_min(torch.finfo(x.dtype).tiny)
    return mean_over_pairs(x, lambda one, other: ((one - other).norm(dim=-1) / norm).mean())


def mean_over_pairs(x: torch.Tensor, distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """Mean of a distance over the pairs of x [E, ...]; 0 where there are none."""
    distances = [distance(x[i], x[j]) for i in range(len(x)) for j in range(i)]
    return torch.stack(distances).mean().item() if distances else 0.0


# ---- cost ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """A model's forward time.

    Attributes:
        milliseconds: of the best round: what others took longer is the machine's other work.
        noise: how far that may be off, as a share of it; two models whose times differ by less than their noises
            together are equal as far as was measured. Infinite after a single round.
    """

    milliseconds: float
    noise: float


@torch.no_grad()
def forward_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], rounds: int
) -> dict[str, Latency]:
    """Best forward time of each model, all on the same batch, interleaved in one run.

    Args:
        models: by name, in eval mode.
        inputs: arguments of the forward.
        rounds: timed rounds after one untimed; each runs every model once, starting with another one each time.

    Returns:
        What was measured, by name.
    """

    def forward(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model(**inputs)
            synchronize(inputs)

        return run

    synchronize(inputs)
    samplers = [wall(forward(model)) for model in models.values()]
    for sample in samplers:
        sample()
    found = side_by_side(samplers, [rounds] * len(samplers))
    return {
        name: Latency(1e3 * min(s for turn in turns for s in turn), noise(turns, min))
        for name, turns in zip(models, found, strict=True)
    }


def synchronize(inputs: Mapping[str, torch.Tensor]) -> None:
    """Waits for the accelerator that holds `inputs`, if it is one."""
    device = next(iter(inputs.values())).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
