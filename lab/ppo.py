"""PPO on a policy of answers: clipped objective, a value network of its own, GAE, and a KL penalty against the start.

Small and exact rather than general: one process, one device, the divergence from the reference measured over the whole
vocabulary at every step. The parts follow Schulman et al. 2017 (arXiv 1707.06347) and, for language, Stiennon et al.
2020 (arXiv 2009.01325) and Huang et al. 2024 (arXiv 2403.17031).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .advantages import gae, token_rewards, whiten
from .kl import Divergence, divergence, entropy
from .policy import PolicyModel, Rollout, Scorer, sample
from .tasks import Sequences


@dataclass(frozen=True)
class PPOConfig:
    """PPO's settings.

    Attributes:
        steps: updates; each samples a fresh batch.
        batch_size: answers a step.
        epochs: passes over them.
        minibatches: parts of each pass, one optimiser step each.
        learning_rate: of the policy (Adam, constant).
        value_learning_rate: of the value network.
        max_grad_norm: gradient clipping, of policy and value network each.
        clip: epsilon of the clipped objective.
        discount: gamma.
        decay: lambda of GAE.
        kl_coefficient: beta; what is maximised is E[reward] - beta * KL(policy || reference), with the reward in
            standard deviations under the reference where `normalise_reward`. Each token's reward loses beta times its
            log-ratio, as in Stiennon et al. A divergence in the loss instead would miss what a token does to the
            states after it, and so have another optimum (Tang and Munos 2025, arXiv 2506.09477).
        entropy_coefficient: weight of the entropy bonus, beside whitened advantages.
        normalise_reward: shift and scale the scorer's rewards by their mean and standard deviation over answers of the
            reference, so that one beta means the same to every scorer.
        normalisation_samples: answers for that.
        forward_batch_size: most answers in a forward without gradient; what memory must hold of a real vocabulary is
            this times the tokens of an answer times the vocabulary, a few times over.
    """

    steps: int = 40
    batch_size: int = 64
    epochs: int = 2
    minibatches: int = 2
    learning_rate: float = 3e-4
    value_learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    clip: float = 0.2
    discount: float = 1.0
    decay: float = 0.95
    kl_coefficient: float = 0.05
    entropy_coefficient: float = 0.0
    normalise_reward: bool = True
    normalisation_samples: int = 512
    forward_batch_size: int = 256

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"PPOConfig: `{name}` must be {expected}, got {getattr(self, name)!r}.")

        for name in ("steps", "batch_size", "epochs", "minibatches", "forward_batch_size"):
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "value_learning_rate", "max_grad_norm", "clip"):
            require(name, getattr(self, name) > 0, "above 0")
        for name in ("discount", "decay"):
            require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("kl_coefficient", "entropy_coefficient"):
            require(name, getattr(self, name) >= 0, "at least 0")
        require("minibatches", self.minibatches <= self.batch_size, f"at most batch_size={self.batch_size}")
        require("normalisation_samples", self.normalisation_samples >= 2, "at least 2")


@dataclass(frozen=True)
class PPORecord:
    """One step, measured on its batch before its update; the mean over answers unless said otherwise.

    Attributes:
        step: updates before it; 0 is the reference itself.
        kl: nats per answer from the reference, exact at the visited states.
        kl_estimate: the same from the sampled tokens' log-ratios alone.
        proxy: the scorer's reward, in its own units.
        reward: what is maximised before the penalty: the proxy, normalised if so configured.
        gold: the gold reward.
        entropy: nats per answer.
        length: tokens of the answers, the end token included.
        explained_variance: 1 - Var(return - value) / Var(return) over tokens; NaN where returns do not vary.
        clip_fraction: share of the tokens of all minibatches whose objective was clipped; None without an update.
        value_loss: mean squared error of the value network over all minibatches; None without an update.
        measures: what else was asked for, by name.
    """

    step: int
    kl: float
    kl_estimate: float
    proxy: float
    reward: float
    gold: float
    entropy: float
    length: float
    explained_variance: float
    clip_fraction: float | None
    value_loss: float | None
    measures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float | int | None]:
        """One flat row, the measures beside the rest."""
        row = dataclasses.asdict(self)
        return row | row.pop("measures")


def run_ppo(
    policy: PolicyModel,
    prompts: Sequences,
    scorer: Scorer,
    gold: Scorer,
    config: PPOConfig,
    seed: int,
    measures: Mapping[str, Scorer] | None = None,
    on_step: Callable[[PPORecord], None] | None = None,
) -> list[PPORecord]:
    """Trains a copy of `policy` against `scorer`.

    Args:
        policy: the start, and the reference of the KL penalty; left as it is.
        prompts: every batch holds each as often as any other, give or take one.
        scorer: the proxy reward that is maximised.
        gold: the reward that is only watched.
        config: PPO's settings.
        seed: of prompts, answers and minibatches. Equal arguments and thread counts give equal numbers.
        measures: further things to watch, e.g. the amount of a shortcut.
        on_step: called with each record.

    Returns:
        steps + 1 records: before every update, and after the last.

    Raises:
        ValueError: a scorer returned another shape than one reward a sequence.
        FloatingPointError: a reward or a loss became NaN or infinite.
    """
    ppo = PPO(policy, prompts, scorer, gold, config, seed, measures)
    records = []
    for step in range(config.steps + 1):
        records.append(ppo.step(update=step < config.steps))
        if on_step is not None:
            on_step(records[-1])
    return records


class ValueNetwork(nn.Module):
    """Values of states: the policy's body, copied, and a linear head that starts at zero.

    A body shared with the policy would be cheaper, but then fitting values moves the policy, and divergence from the
    reference no longer is the price of reward alone.
    """

    def __init__(self, policy: PolicyModel) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.network.base_model)
        self.head = nn.Linear(policy.network.config.hidden_size, 1, device=policy.allowed.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, sequences: Sequences) -> torch.Tensor:
        """fp32 [N, longest - 1]: position t is the value of the state in which token t + 1 is chosen."""
        tokens = sequences.inputs(self.head.weight.device)["input_ids"][:, :-1]
        hidden = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()


class PPO:
    """PPO step by step; see `run_ppo` for the arguments.

    Attributes:
        policy: the policy being trained.
        reference: the start.
        value: the value network.
        shift, scale: the reward is (proxy - shift) / scale.
    """

    def __init__(
        self,
        policy: PolicyModel,
        prompts: Sequences,
        scorer: Scorer,
        gold: Scorer,
        config: PPOConfig,
        seed: int,
        measures: Mapping[str, Scorer] | None = None,
    ) -> None:
        self.policy, self.reference = policy.copy(), policy
        with torch.random.fork_rng(devices=[]):
            self.value = ValueNetwork(policy)
        self.prompts, self.scorer, self.gold, self.config = prompts, scorer, gold, config
        self.measures = dict(measures or {})
        self.generator = torch.Generator().manual_seed(seed)
        # no dropout: the ratio of new to old probability must be of one and the same function
        self.policy.network.eval()
        self.value.eval()
        self.optimizers = (
            torch.optim.Adam(self.policy.network.parameters(), lr=config.learning_rate),
            torch.optim.Adam(self.value.parameters(), lr=config.value_learning_rate),
        )
        self.steps_done = 0
        self.shift, self.scale = 0.0, 1.0
        if config.normalise_reward:
            proxy = _score("scorer", scorer, self._rollout(config.normalisation_samples).sequences)
            self.shift, self.scale = proxy.mean().item(), proxy.std().item()
            if self.scale == 0:
                raise ValueError(
                    "`scorer` gives every answer of the reference one and the same reward, which cannot be normalised; "
                    "set `normalise_reward` to False."
                )

    def step(self, update: bool = True) -> PPORecord:
        """Samples a batch, measures it, and by default trains on it."""
        config = self.config
        rollout = self._rollout(config.batch_size)
        proxy = _score("scorer", self.scorer, rollout.sequences)
        gold = _score("gold", self.gold, rollout.sequences)
        watched = {name: _score(name, f, rollout.sequences) for name, f in self.measures.items()}
        reward = (proxy - self.shift) / self.scale
        measured = divergence(self.policy, self.reference, rollout, config.forward_batch_size)
        values = self._values(rollout)
        rewards = token_rewards(reward.float(), config.kl_coefficient * measured.log_ratio, rollout.mask)
        advantages = gae(rewards, values, rollout.mask, config.discount, config.decay)
        returns = advantages + values
        clip_fraction, value_loss = self._update(rollout, measured, advantages, returns) if update else (None, None)
        record = PPORecord(
            step=self.steps_done,
            kl=measured.sequence_kl(),
            kl_estimate=measured.sequence_kl_estimate(),
            proxy=proxy.mean().item(),
            reward=reward.mean().item(),
            gold=gold.mean().item(),
            entropy=measured.sequence_entropy(),
            length=rollout.answer_lengths().double().mean().item(),
            explained_variance=explained_variance(values[rollout.mask], returns[rollout.mask]),
            clip_fraction=clip_fraction,
            value_loss=value_loss,
            measures={name: value.mean().item() for name, value in watched.items()},
        )
        self.steps_done += update
        return record

    def _rollout(self, count: int) -> Rollout:
        available = len(self.prompts)
        rounds = [torch.randperm(available, generator=self.generator) for _ in range(math.ceil(count / available))]
        prompts = self.prompts.select(torch.cat(rounds)[:count])
        return sample(self.policy, prompts, self.generator, self.config.forward_batch_size)

    @torch.no_grad()
    def _values(self, rollout: Rollout) -> torch.Tensor:
        """Values of the visited states [N, L - 1] on the CPU, 0 outside the mask."""
        values = torch.zeros(rollout.mask.shape)
        for rows in torch.arange(len(values)).split(self.config.forward_batch_size):
            chosen = rollout.sequences.select(rows)
            values[rows, : int(chosen.lengths.max()) - 1] = self.value(chosen).cpu()
        return values.masked_fill(~rollout.mask, 0.0)

    def _update(
        self, rollout: Rollout, measured: Divergence, advantages: torch.Tensor, returns: torch.Tensor
    ) -> tuple[float, float]:
        """Several epochs of minibatches; the clip fraction and value loss over all of them."""
        config, mask = self.config, rollout.mask
        advantages = whiten(advantages, mask)
        # one divisor for every minibatch, so that the parts of a pass add up to the whole batch's gradient
        divisor = mask.sum().item() / config.minibatches
        clipped = squared = 0.0
        for _ in range(config.epochs):
            order = torch.randperm(len(mask), generator=self.generator)
            for rows in order.tensor_split(config.minibatches):
                chosen = rollout.sequences.select(rows)
                width = int(chosen.lengths.max()) - 1
                old, gain, target, live = (
                    x[rows, :width].to(self.policy.allowed.device)
                    for x in (measured.logprobs, advantages, returns, mask)
                )
                tokens = chosen.tokens[:, 1 : width + 1, None].to(old.device)
                logprobs = self.policy.log_probabilities(chosen)
                new = logprobs.gather(2, tokens).squeeze(2)
                objective, was_clipped = clipped_objective((new - old).masked_fill(~live, 0.0), gain, config.clip)
                if config.entropy_coefficient > 0:
                    objective = objective + config.entropy_coefficient * entropy(logprobs)
                losses = (
                    -objective[live].sum() / divisor,
                    (self.value(chosen) - target)[live].square().sum() / divisor,
                )
                for loss, optimizer in zip(losses, self.optimizers, strict=True):
                    self._descend(loss, optimizer)
                clipped += was_clipped[live].sum().item()
                squared += losses[1].item() * divisor
        seen = config.epochs * mask.sum().item()
        return clipped / seen, squared / seen

    def _descend(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"a loss became {loss.item()} at step {self.steps_done}; lower `learning_rate`.")
        optimizer.zero_grad()
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.config.max_grad_norm)
        optimizer.step()


def clipped_objective(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective of each token, to be maximised (Schulman et al. 2017, equation 7).

    Args:
        log_ratio: log-probability of the token now less when it was sampled.
        advantages: of the same shape.
        clip: epsilon.

    Returns:
        min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A), and where the second is smaller: there is no gradient.
    """
    ratio = log_ratio.exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(free, bounded), bounded < free


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    spread = returns.double().var(correction=0).item()
    return 1 - (returns - values).double().var(correction=0).item() / spread if spread > 0 else math.nan


def _score(name: str, scorer: Scorer, sequences: Sequences) -> torch.Tensor:
    """The scorer's rewards as fp64 [N] on the CPU, checked."""
    with torch.no_grad():
        rewards = scorer(sequences)
    if rewards.shape != (len(sequences),):
        raise ValueError(
            f"`{name}` must return one reward a sequence, [{len(sequences)}], got {list(rewards.shape)}; "
            "squeeze the model's logits."
        )
    if not bool(rewards.isfinite().all()):
        raise FloatingPointError(f"`{name}` returned a reward that is NaN or infinite.")
    return rewards.double().cpu()
