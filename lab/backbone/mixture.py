"""The token mixture of many replicas: all experts stand in one stack, routed and run by the product's operators.

A replica's shared expert is the first of its part of the stack, and one more slot of every live token. Learning merge
weights and merging are the product's operators too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ummrm import UpcycleConfig, ops
from ummrm.nn.losses import cv_squared_loss, load_balancing_loss
from ummrm.nn.router import NOISE_FLOOR

from .data import Block, Network
from .optimiser import Optimisation, optimise
from .replicas import Parameters
from .training import OnStep, generators, orders, pair_losses, rates_of


@dataclass
class TokenMixture:
    """The mixture in the FFNs' place for one forward; keeps what the auxiliary loss needs.

    Attributes:
        network: whose FFNs they are.
        config: of experts, router and gate.
        parameters: with those that `token_upcycled` adds.
        draws: a generator for each replica, of the learned router noise; None outside training.
        losses: of each layer so far, [R].
    """

    network: Network
    config: UpcycleConfig
    parameters: Parameters
    draws: list[torch.Generator] | None = None
    losses: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, x: Tensor, live: Tensor) -> Tensor:
        """`data.MixtureFFN`. Rows that aren't live come out zero, which nothing reads."""
        config, names = self.config, self.network.ffns[layer]
        replicas, rows, hidden = x.shape
        clean = _logits(x, self.parameters[f"{layer}.router"], live)
        if config.router == "mlp":
            clean = _logits(clean.tanh(), self.parameters[f"{layer}.router_output"], live)
        noisy = clean
        if config.router_noise == "learned" and self.draws is not None:
            noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in self.draws])
            std = F.softplus(_logits(x, self.parameters[f"{layer}.router_noise"], live)) + NOISE_FLOOR
            noisy = clean + noise * std
        routes = [
            ops.route(
                noisy[r],
                mask=live[r],
                clean_logits=None if noisy is clean else clean[r],
                top_k=config.num_experts_per_tok,
                gate=config.gate,
                fixed_shared_weight=config.fixed_shared_weight,
            )
            for r in range(replicas)
        ]
        self._add_loss(routes)
        each = config.num_experts + 1
        first = (torch.arange(replicas) * each).view(-1, 1, 1)
        shared = torch.where(live, 0, -1)[..., None]
        routed = torch.stack([route.expert_indices for route in routes])
        indices = torch.cat([shared, torch.where(routed < 0, -1, routed + 1)], 2)
        indices = torch.where(indices < 0, -1, indices + first).int()
        weights = torch.cat(
            [
                torch.stack([route.shared_weight for route in routes])[..., None],
                torch.stack([route.routed_weights for route in routes]),
            ],
            2,
        )
        up, down = (self.parameters[name].flatten(0, 1) for name in (names.up, names.down))
        biases = [None if n is None else self.parameters[n].flatten(0, 1) for n in (names.up_bias, names.down_bias)]
        no_up, no_down = (t.new_empty(0, *t.shape[1:]) for t in (up, down))  # the shared ones are among the stack
        no_biases = [None if t is None else t.new_empty(0, *t.shape[1:]) for t in biases]
        out = ops.moe_ffn(
            x.reshape(-1, hidden),
            x.new_zeros(replicas * rows),
            weights.flatten(0, 1),
            indices.flatten(0, 1),
            no_up,
            up,
            no_down,
            down,
            no_biases[0],
            biases[0],
            no_biases[1],
            biases[1],
            activation=names.activation,
            glu=names.glu,
        )
        return out.view(x.shape)

    def _add_loss(self, routes: list[ops.RouteOutput]) -> None:
        config = self.config
        prob = torch.stack([route.mean_prob for route in routes])
        z = torch.stack([route.mean_z for route in routes])
        if config.balancing_loss == "switch":
            balancing = load_balancing_loss(torch.stack([route.tokens_per_expert for route in routes]), prob)
        else:
            balancing = cv_squared_loss(prob)
        self.losses.append(config.balancing_loss_coef * balancing + config.z_loss_coef * z)

    def auxiliary_loss(self) -> Tensor:
        """Mean over layers of each replica's router losses, [R]."""
        return torch.stack(self.losses).mean(0)


def check_token_config(config: UpcycleConfig) -> None:
    """Raises ValueError for what the laboratory's mixture doesn't do."""
    allowed = {
        "assignment": ("token",),
        "num_shared_experts": (1,),
        "layers": ("all",),
        "router_noise": (None, "learned"),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"`upcycle.{name}` must be {values[0]!r} here, got {getattr(config, name)!r}.")
    if config.expert_noise:
        raise ValueError(f"`upcycle.expert_noise` must be 0 here, got {config.expert_noise}.")


def token_upcycled(block: Block, config: UpcycleConfig) -> Parameters:
    """The start with E + 1 copies of every FFN, the shared one first, and fresh routers."""
    network = block.network
    names = network.expert_names("ffn")
    made = {
        name: value[:, None].repeat(1, config.num_experts + 1, *[1] * (value.dim() - 1)) if name in names else value
        for name, value in block.start.items()
    }
    draws = generators(block.seeds, "router")
    for layer in range(len(network.ffns)):
        sizes = {f"{layer}.router": network.hidden_size}
        if config.router == "mlp":
            sizes[f"{layer}.router_output"] = config.num_experts
        for name, columns in sizes.items():
            drawn = [torch.randn(config.num_experts, columns, generator=g) for g in draws]
            made[name] = config.router_init_std * torch.stack(drawn)
        if config.router_noise == "learned":
            made[f"{layer}.router_noise"] = torch.zeros(len(draws), config.num_experts, network.hidden_size)
    return made


def train_token(
    block: Block,
    steps: int,
    batch: int,
    rate: float,
    settings: Optimisation,
    config: UpcycleConfig,
    on_step: OnStep | None = None,
) -> Parameters:
    """Upcycled reward models, trained on the preference loss and the router's auxiliary losses."""
    everyone = torch.arange(len(block.seeds))
    index = orders(block.seeds, 0, len(block.train), steps, batch)
    draws = generators(block.seeds, "router noise")

    def loss(parameters: Parameters, step: int) -> Tensor:
        features = block.train.take(everyone, index[step])
        mixture = TokenMixture(block.network, config, parameters, draws)
        rewards = block.network.rewards(parameters, features, mixture=mixture)
        return pair_losses(rewards) + mixture.auxiliary_loss()

    start = token_upcycled(block, config)
    return optimise(start, loss, steps, rates_of(rate, block.seeds), block.network.undecayed, settings, on_step)


def merge_coefficients(alpha: Tensor, shared_share: float) -> Tensor:
    """Coefficients [..., 1 + E], the shared expert first, from merge logits [..., E]."""
    shared = torch.full_like(alpha[..., :1], shared_share)
    return torch.cat([shared, (1 - shared_share) * alpha.softmax(-1)], -1)


def merged(block: Block, parameters: Parameters, alpha: Tensor, shared_share: float) -> Parameters:
    """The dense models into which mixtures fold; differentiable in alpha, [R, layers, E]."""
    coefficients = merge_coefficients(alpha, shared_share)
    dense = {name: value for name, value in parameters.items() if ".router" not in name}
    for layer, names in enumerate(block.network.ffns):
        parts: dict[str, list[Tensor]] = {name: [] for name in names.names}
        for r in range(len(alpha)):
            given = {name: parameters[name][r] for name in names.names}
            tensors = ops.merge_experts(
                [t[:1] for t in given.values()],
                [t[1:] for t in given.values()],
                coefficients[r, layer].expand(len(given), -1).contiguous(),
            )
            for name, tensor in zip(given, tensors, strict=True):
                parts[name].append(tensor)
        dense |= {name: torch.stack(tensors) for name, tensors in parts.items()}
    return dense


def learn_alpha(
    block: Block,
    parameters: Parameters,
    steps: int,
    batch: int,
    rate: float,
    settings: Optimisation,
    experts: int,
    shared_share: float,
    on_step: OnStep | None = None,
) -> Tensor:
    """Merge logits [R, layers, E] learned on the preference loss of the merged models, from uniform ones."""
    everyone = torch.arange(len(block.seeds))
    index = orders(block.seeds, "alpha", len(block.train), max(steps, 1), batch)
    alpha = torch.zeros(len(block.seeds), len(block.network.ffns), experts)
    if steps == 0:
        return alpha

    def loss(learned: Parameters, step: int) -> Tensor:
        dense = merged(block, parameters, learned["alpha"], shared_share)
        return pair_losses(block.network.rewards(dense, block.train.take(everyone, index[step])))

    found = optimise(
        {"alpha": alpha}, loss, steps, rates_of(rate, block.seeds), frozenset(["alpha"]), settings, on_step
    )
    return found["alpha"]


def _logits(x: Tensor, weight: Tensor, live: Tensor) -> Tensor:
    """Each replica's live rows of x [R, N, D] by its router [R, E, D], one product after the other; zeros elsewhere.

    As one batched product, or with rows that others' texts pad, a replica's logits have other last bits beside others
    than alone: on AMD's Zen, not on Intel's cores with AVX-512.
    """
    logits = []
    for rows, one, lives in zip(x, weight, live, strict=True):
        at = lives.nonzero().flatten()
        logits.append(x.new_zeros(len(rows), len(one)).index_copy(0, at, F.linear(rows[at], one)))
    return torch.stack(logits)
