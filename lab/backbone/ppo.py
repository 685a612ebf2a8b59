"""PPO against an arm of a block of seeds: each seed's own policy, reward and gold, one seed after another.

The policy is the seed's pretrained backbone with its language head: it learned from answers drawn as the policy's are,
and from none of those that are measured. It is closer to them than a policy of `lab.policy.train_policy`: 23.5 to 24.6
nats an answer on fresh ones, against 23.7 to 24.9 (three seeds). PPO itself is the laboratory's (`lab.ppo`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config import MeasureConfig
from ..policy import PolicyModel, Scorer, policy_of
from ..ppo import PPORecord, run_ppo
from ..seeds import derive
from ..tasks import Sequences
from ..units import path_row, path_values
from .arms import OnStep, RewardModels
from .data import Block
from .llama import Llama
from .measures import Scores, combined
from .ppo_config import PolicyTraining


def policy_path(
    block: Block,
    seed: int,
    reward: Scorer,
    ppo: PolicyTraining,
    measure: MeasureConfig,
    on_step: OnStep | None = None,
) -> dict:
    """Trains the policy of one seed against a reward.

    Args:
        block: the seeds.
        seed: which one, by its place in the block.
        reward: what is maximised (`reward_of`).
        ppo: settings.
        measure: where the path is read.
        on_step: told of steps.

    Returns:
        Its `values` and its `curve`, as `measures.measure` gives them of best-of-n.
    """
    assert block.tasks is not None
    task, number = block.tasks[seed], block.seeds[seed]
    assert task.prompts is not None and task.gold is not None and task.shortcut_of is not None

    def said(record: PPORecord) -> None:
        if on_step is not None:
            on_step(f"PPO, seed {number}", record.step, ppo.settings.steps)

    records = run_ppo(
        start_of(block, seed, ppo.answer_tokens),
        task.prompts,
        reward,
        task.gold,
        ppo.settings,
        derive(number, "ppo"),
        {"shortcut": task.shortcut_of},
        said,
    )
    mean, std = task.policy.gold.mean().item(), task.policy.gold.std().item()
    curve = [path_row(record, mean, std) for record in records]
    return {"values": path_values(curve, measure), "curve": curve}


def start_of(block: Block, seed: int, answer_tokens: int) -> PolicyModel:
    """The policy of a seed before its training: its backbone as a stock language model."""
    assert block.tasks is not None and block.language_models is not None and isinstance(block.network, Llama)
    return policy_of(block.tasks[seed], block.network.to_stock(block.language_models, seed), answer_tokens)


def reward_of(models: RewardModels, members: Sequence[Scores], seed: int) -> Scorer:
    """An arm's reward of any answers of one seed; several models' are normalised and combined as under best-of-n.

    Args:
        models: the arm.
        members: scores of each of its models (`BackboneArms.member_scores`).
        seed: by its place in the block.
    """
    alone = [model.of(seed) for model in models.members.values()]
    references = [scores.sets["reference"][seed : seed + 1] for scores in members]

    def reward(sequences: Sequences) -> Tensor:
        features = {"tokens": sequences.tokens[None], "lengths": sequences.lengths[None]}
        scores = [
            Scores({"answers": model(features).double(), "reference": reference})
            for model, reference in zip(alone, references, strict=True)
        ]
        return combined(scores, models.rule, models.uncertainty).sets["answers"][0]

    return reward
