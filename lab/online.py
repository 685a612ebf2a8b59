"""RLOO and GRPO by TRL against an arm's reward model, measured as PPO is: exact KL, proxy and gold on fresh answers.

TRL samples, penalises and updates; its own penalty is of sampled tokens (RLOO: the summed log-ratio, in the reward;
GRPO: Schulman's k3 in the loss). What is written down is measured apart from it, by `kl.py`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .checkpoints import PromptTemplate
from .kl import divergence
from .policy import PolicyModel, Scorer, sample
from .reading import require
from .tasks import Sequences


@dataclass(frozen=True)
class OnlineConfig:
    """TRL's RLOO or GRPO; what is not named here is TRL's default.

    Attributes:
        steps: updates.
        batch_size: answers an update.
        generations: of these, answers to one prompt.
        forward_batch_size: answers in a forward; gradients add up over an update.
        learning_rate: AdamW's, constant.
        kl_coefficient: TRL's `beta`; rewards are in standard deviations under the start.
        gradient_checkpointing: recompute activations in the backward.
        measure_every: updates between two measurements.
        measure_samples: fresh answers of each measurement.
    """

    steps: int = 100
    batch_size: int = 64
    generations: int = 4
    forward_batch_size: int = 16
    learning_rate: float = 1e-6
    kl_coefficient: float = 0.05
    gradient_checkpointing: bool = False
    measure_every: int = 5
    measure_samples: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "forward_batch_size", "measure_every", "measure_samples"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "generations", self.generations >= 2, "at least 2")
        whole = self.batch_size % self.generations == 0 and self.batch_size % self.forward_batch_size == 0
        require(self, "batch_size", whole, "a multiple of `generations` and of `forward_batch_size`")
        require(self, "learning_rate", self.learning_rate > 0, "above 0")
        require(self, "kl_coefficient", self.kl_coefficient >= 0, "at least 0")
        require(self, "measure_every", self.measurements >= 3, f"below steps={self.steps}: a curve is fitted")

    @property
    def measurements(self) -> int:
        """How many there are: before the first update, on the way, and after the last."""
        return 1 + math.ceil(self.steps / self.measure_every)


@dataclass(frozen=True)
class OnlineRecord:
    """A policy on fresh answers; means over answers.

    Attributes:
        step: updates before it; 0 is the start.
        kl: nats per answer from the start, exact at the visited states.
        kl_estimate: the same from the sampled tokens' log-ratios alone.
        reward: the scorer's.
        gold: the gold reward.
        entropy: nats per answer.
        length: tokens of the answers, the end token included.
        measures: what else was asked for, by name.
    """

    step: int
    kl: float
    kl_estimate: float
    reward: float
    gold: float
    entropy: float
    length: float
    measures: dict[str, float]


def require_trl() -> None:
    """Raises ValueError, saying what to install, where TRL is missing."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("the optimisers rloo and grpo need TRL, which is not installed: pip install 'ummrm[trl]'.")


def run_online(
    optimiser: str,
    policy: PolicyModel,
    prompts: Sequences,
    texts: Sequence[str],
    scorer: Scorer,
    gold: Scorer,
    config: OnlineConfig,
    seed: int,
    prompt_template: PromptTemplate,
    computing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    measures: Mapping[str, Scorer] | None = None,
    on_step: Callable[[OnlineRecord], None] | None = None,
) -> list[OnlineRecord]:
    """Trains a copy of `policy` against `scorer`.

    Args:
        optimiser: `"rloo"` or `"grpo"`.
        policy: the start and the reference, left as it is; loaded by name, since TRL loads its reference so.
        prompts: what is answered.
        texts: the same as text, which `prompt_template`'s tokenizer turns into the same tokens.
        scorer: the reward that is maximised, normalised by the caller.
        gold: the reward that is only watched.
        config: the settings.
        seed: of everything that is drawn.
        prompt_template: the policy's tokenizer.
        computing: the context of forwards outside TRL; under one of bf16, TRL's are in bf16 too.
        measures: further things to watch.
        on_step: called with each record.

    Returns:
        A record before the first update, after every `measure_every` and after the last.

    Raises:
        ValueError: TRL is not installed.
        FloatingPointError: the policy's probabilities became NaN.
    """
    require_trl()
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trained = policy.copy()
    device = trained.allowed.device
    with computing():
        half = torch.is_autocast_enabled(device.type)
    records: list[OnlineRecord] = []

    def measure(step: int) -> None:
        training = trained.network.training
        trained.network.eval()
        with computing(), torch.no_grad():
            generator = torch.Generator().manual_seed(seed + step)
            records.append(_measure(step, trained, policy, prompts, scorer, gold, config, generator, measures or {}))
        trained.network.train(training)
        if on_step is not None:
            on_step(records[-1])

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step % config.measure_every == 0 or state.global_step == config.steps:
                measure(state.global_step)

    rows = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)]
    tokens = dict(zip(texts, rows, strict=True))

    def reward(prompts: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        rows = []
        for text, answer in zip(prompts, completion_ids, strict=True):
            ended = answer[-1:] == [policy.end_token]
            rows.append([*tokens[text], *answer, *([] if ended else [policy.end_token])])
        with computing():
            return scorer(Sequences.from_lists(rows, policy.pad_token_id)).tolist()

    trainer_class, config_class = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[optimiser]
    measure(0)
    with tempfile.TemporaryDirectory() as folder, torch.autocast(device.type, enabled=False):
        trainer = trainer_class(
            trained.network,
            reward_funcs=[reward],
            args=config_class(
                folder,
                use_cpu=device.type == "cpu",
                bf16=half,
                seed=seed % 2**32,
                max_steps=config.steps,
                per_device_train_batch_size=config.forward_batch_size,
                gradient_accumulation_steps=config.batch_size // config.forward_batch_size,
                num_generations=config.generations,
                # the end token of an answer that reaches the longest length is no choice of the policy
                max_completion_length=policy.max_answer_tokens - 1,
                temperature=1.0,
                generation_kwargs={"suppress_tokens": (~policy.allowed).nonzero().squeeze(1).tolist()},
                learning_rate=config.learning_rate,
                lr_scheduler_type="constant",
                beta=config.kl_coefficient,
                disable_dropout=True,
                gradient_checkpointing=config.gradient_checkpointing,
                use_vllm=False,
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": list(texts)}),
            processing_class=prompt_template.tokenizer,
            callbacks=[Measure()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        del trainer
    gc.collect()  # trainers are cycles: reference and optimiser would stay on the device beside the next run's
    return records


def _measure(
    step: int,
    policy: PolicyModel,
    reference: PolicyModel,
    prompts: Sequences,
    scorer: Scorer,
    gold: Scorer,
    config: OnlineConfig,
    generator: torch.Generator,
    measures: Mapping[str, Scorer],
) -> OnlineRecord:
    rounds = math.ceil(config.measure_samples / len(prompts))
    order = torch.cat([torch.randperm(len(prompts), generator=generator) for _ in range(rounds)])
    chosen = prompts.select(order[: config.measure_samples])
    rollout = sample(policy, chosen, generator, config.forward_batch_size)
    measured = divergence(policy, reference, rollout, config.forward_batch_size)
    return OnlineRecord(
        step=step,
        kl=measured.sequence_kl(),
        kl_estimate=measured.sequence_kl_estimate(),
        reward=scorer(rollout.sequences).mean().item(),
        gold=gold(rollout.sequences).mean().item(),
        entropy=measured.sequence_entropy(),
        length=rollout.answer_lengths().double().mean().item(),
        measures={name: watch(rollout.sequences).mean().item() for name, watch in measures.items()},
    )
