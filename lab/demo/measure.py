"""Measurements of reward models: scores, accuracy, best-of-n, expert specialisation, forward latency."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ummrm.nn.experts import Experts
from ummrm.nn.losses import preference_loss
from ummrm.nn.upcycled_ffn import UpcycledFFN, upcycled_ffns
from ummrm.ops.reference import ACTIVATIONS

from ..tasks import PreferencePairs, Sequences


@torch.no_grad()
def score(
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
    chosen, rejected = score(model, pairs.chosen, batch_size), score(model, pairs.rejected, batch_size)
    value = ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()
    return Accuracy(value, math.sqrt(value * (1 - value) / len(pairs)))


def mean_loss(model: nn.Module, pairs: PreferencePairs, batch_size: int) -> float:
    """Preference loss over all pairs, with the model in eval mode."""
    return preference_loss(score(model, pairs.chosen, batch_size), score(model, pairs.rejected, batch_size)).item()


# ---- best-of-n -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestOfN:
    """Gold and proxy reward under best-of-n selection by a reward model.

    Attributes:
        n: sample counts.
        kl: exact KL divergence of best-of-n from the policy, ln n - (n - 1) / n nats.
        gold: mean gold reward of the selected answer.
        gold_error: its standard error over prompts.
        proxy: mean reward by the selecting model, in standard deviations of its rewards from their mean.
        shortcut: mean amount of the shortcut in the selected answer.
    """

    n: list[int]
    kl: list[float]
    gold: list[float]
    gold_error: list[float]
    proxy: list[float]
    shortcut: list[float]


def best_of_n(
    proxy: torch.Tensor, gold: torch.Tensor, shortcut: torch.Tensor, sizes: Sequence[int] | None = None
) -> BestOfN:
    """Expected outcome of best-of-n, by the unbiased estimator over all subsets of the samples.

    Args:
        proxy: [prompts, samples], the selecting model's rewards.
        gold: [prompts, samples].
        shortcut: [prompts, samples].
        sizes: values of n, at most the number of samples; default powers of two.

    Returns:
        A row for each n.
    """
    samples = proxy.shape[1]
    sizes = list(sizes) if sizes is not None else [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    standard = (proxy - proxy.mean()) / proxy.std().clamp_min(torch.finfo(proxy.dtype).tiny)
    rows = {
        name: [best_of_n_mean(proxy, v, n) for n in sizes]
        for name, v in {"gold": gold, "proxy": standard, "shortcut": shortcut}.items()
    }
    prompts = proxy.shape[0]
    return BestOfN(
        n=sizes,
        kl=[best_of_n_kl(n) for n in sizes],
        gold=[v.mean().item() for v in rows["gold"]],
        gold_error=[v.std().item() / math.sqrt(prompts) if prompts > 1 else math.nan for v in rows["gold"]],
        proxy=[v.mean().item() for v in rows["proxy"]],
        shortcut=[v.mean().item() for v in rows["shortcut"]],
    )


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-n from the policy in nats, ln n - (n - 1) / n: exact where answers never tie."""
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def best_of_n_mean(proxy: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    """Mean over all n-subsets of the value of each subset's best sample (Nakano et al., arXiv 2112.09332, appendix I).

    Args:
        proxy: [prompts, samples], by which the best is chosen; ties go to the later sample.
        values: [prompts, samples].
        n: 1 to samples.

    Returns:
        fp64 [prompts].

    Raises:
        ValueError: `n` is outside.
    """
    samples = proxy.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"`n` must be 1 to the number of samples, {samples}, got {n}.")
    rank = torch.arange(1, samples + 1, dtype=torch.float64)
    # the sample of rank i is the best of a subset if the n - 1 others come from the i - 1 below: C(i-1, n-1) / C(N, n)
    log_weight = _log_binomial(rank - 1, n - 1) - _log_binomial(torch.tensor(samples, dtype=torch.float64), n)
    weight = log_weight.masked_fill(rank < n, -math.inf).exp()
    ordered = values.double().gather(1, proxy.argsort(dim=1, stable=True))
    return ordered @ weight


def _log_binomial(n: torch.Tensor, k: int) -> torch.Tensor:
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma((n - k).clamp_min(0) + 1)


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
        score(moe, sequences, batch_size)
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
    distances = [((x[i] - x[j]).norm(dim=-1) / norm).mean() for i in range(experts) for j in range(i)]
    return torch.stack(distances).mean().item()


# ---- cost ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], rounds: int
) -> dict[str, float]:
    """Median forward time of each model in milliseconds, all on the same batch, interleaved in one run.

    Args:
        models: by name, in eval mode.
        inputs: arguments of the forward.
        rounds: timed rounds after one untimed; each runs every model once, starting with another one each time.

    Returns:
        Milliseconds by name.
    """
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            synchronize(inputs)
            start = time.perf_counter()
            models[name](**inputs)
            synchronize(inputs)
            if turn > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def synchronize(inputs: Mapping[str, torch.Tensor]) -> None:
    """Waits for the accelerator that holds `inputs`, if it is one."""
    device = next(iter(inputs.values())).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
