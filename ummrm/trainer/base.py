"""What both trainers add to TRL's RewardTrainer: counted over-long pairs, complete metrics, safe resuming, a card.

TRL's arguments, data formats and losses (margins, centred rewards) are its own business and stay as they are.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from trl import RewardConfig, RewardTrainer

from ..hf import card
from ..hf.merge_share import follow_share
from ..hf.normalization import RewardNormalization, of_rewards, reward_normalization, score, set_reward_normalization
from ..hf.parallel import balanced_shards
from ..hf.saving import save_shared
from ..hf.sharding import hold_experts, is_sharded, own_steps, partitions
from ..hf.tokenizers_v4 import save_tokenizer
from ..nn.merging_ffn import merging_ffns
from ..nn.modes import evaluation_mode
from ..nn.upcycled_ffn import upcycled_ffns
from .lengths import Dropped, LengthFilter, report
from .metrics import RewardMetrics

PAPER = {
    "title": "UMM-RM: An Upcycle-and-Merge MoE Reward Model for Mitigating Reward Hacking",
    "id": "2512.00724",
}
_BATCH_METRICS = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
"""TRL's, means of batches' values, whatever the batches' sizes: 17 pairs at batch 8 gave 0.583 for 0.412."""
_UNINTERESTING = re.compile(r"runtime|per_second|flos|grad_norm|learning_rate|^(epoch|step)$|/")


class UmmTrainer(RewardTrainer, abc.ABC):
    """The part that `UmmRewardTrainer` and `UmmMergeTrainer` share; use one of those.

    Args:
        model: as in `RewardTrainer`.
        args: as in `RewardTrainer`.
        rest: further positional arguments of `RewardTrainer`.
        log_layers: log per-layer metrics too, not only their means over layers.
        kwargs: keyword arguments of `RewardTrainer`.
    """

    _tag_names = ["trl", "reward-trainer", "ummrm"]
    _paper = PAPER
    _config_class: type[RewardConfig] = RewardConfig
    _output_suffix = "Reward"
    _unit = "pairs"  # what a row of the data is

    def __init__(self, model, args=None, *rest, log_layers: bool = True, **kwargs) -> None:
        self.log_layers = log_layers
        self.long_pairs: dict[str, Dropped] = {}  # data set name to what was too long
        self._filtered: set[str] = set()
        self._streams: dict[str, LengthFilter] = {}
        self._metric_prefix = "eval"
        self._evaluated: list[torch.Tensor] = []  # the loss of each pair or text that was evaluated, of all processes
        self._rewards = {"train": RewardMetrics(), "eval": RewardMetrics()}
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if not isinstance(model, str):
            self._check_model(model)
        super().__init__(model, self._own_args(model) if args is None else args, *rest, **kwargs)
        if isinstance(model, str):
            self._check_model(self._network)

    @classmethod
    def _own_args(cls, model: nn.Module | str) -> RewardConfig:
        """What is taken where no arguments are given: TRL's, whose default of bf16 a CPU refuses unless it is named."""
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        folder = f"{Path(str(name)).name or 'model'}-{cls._output_suffix}"
        return cls._config_class(folder, use_cpu=not torch.accelerator.is_available())

    @abc.abstractmethod
    def _check_model(self, model: nn.Module) -> None:
        """Raises TypeError unless the trainer can train `model`."""

    @property
    def _network(self) -> Any:
        """The model that is trained: a `PreTrainedModel`, or a `PeftModel` around one; it is always there."""
        assert self.model is not None
        return self.model

    # ---- data --------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        unlimited = copy.copy(args)
        unlimited.max_length = None  # tokenise everything, so that what is too long can be counted
        prepared = super()._prepare_dataset(dataset, processing_class, unlimited, dataset_name)
        if args.max_length is None or getattr(dataset, "_fingerprint", None) in self._filtered:
            return prepared
        tokenised = {"chosen_ids", "rejected_ids"} <= set(_columns(dataset))
        tokenised = tokenised or {"chosen_input_ids", "rejected_input_ids"} <= set(_columns(dataset))
        if not isinstance(prepared, Dataset):
            if tokenised:
                return prepared
            self._streams[dataset_name] = LengthFilter(args.max_length, stream=dataset_name)
            return prepared.filter(self._streams[dataset_name])
        fits = prepared.filter(LengthFilter(args.max_length), num_proc=args.dataset_num_proc)
        self.long_pairs[dataset_name] = Dropped(len(prepared) - len(fits), len(prepared), kept=tokenised)
        report(dataset_name, self.long_pairs[dataset_name], args.max_length, warn=args.process_index == 0)
        ready = prepared if tokenised else fits
        self._filtered.add(ready._fingerprint)  # TRL hands data that is ready in again at every evaluation
        return ready

    # ---- loss and metrics --------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        mode = "train" if self._network.training else "eval"
        for name in _BATCH_METRICS:
            self._metrics[mode].pop(name, None)
        pairs = torch.stack(outputs.logits.detach().squeeze(-1).chunk(2), dim=1)
        if mode == "eval":
            counted = torch.cat([pairs, self._losses_of(pairs, inputs.get("margin"))[:, None]], dim=1)
            counted = self._gathered_rows(counted)
            pairs = counted[:, :2]
            self._evaluated.append(counted[:, 2])
        self._rewards[mode].add_pairs(pairs)
        loss = self._extra_loss(model, loss, mode)
        return (loss, outputs) if return_outputs else loss

    def _losses_of(self, pairs: torch.Tensor, margin: torch.Tensor | None) -> torch.Tensor:
        """TRL's loss of each pair: [P, 2] to [P]."""
        chosen, rejected = pairs.float().unbind(1)
        losses = -F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin))
        args: Any = self.args
        centring = args.center_rewards_coefficient
        return losses if centring is None else losses + centring * (chosen + rejected).square()

    def _extra_loss(self, model: nn.Module, loss: torch.Tensor, mode: str) -> torch.Tensor:
        """The loss with whatever the phase adds to TRL's."""
        return loss

    def _phase_metrics(self, mode: str) -> dict[str, float]:
        """What the phase logs, beyond TRL's metrics, since the last call."""
        return {}

    def _forget(self, mode: str) -> None:
        """Drops what was gathered for `mode` and not logged."""
        self._rewards[mode] = RewardMetrics()

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        on_device = tensor.float() if self.accelerator.device.type == "mps" else tensor
        return self.accelerator.reduce(on_device.to(self.accelerator.device), "sum")

    def _largest_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.gather(tensor.float().to(self.accelerator.device)[None]).amax(0)

    def _gathered_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of an evaluation batch of all processes, each once: none that fills up the last batch, and those of
        processes that share a batch (tensor parallelism), which accelerate takes for several, from one of them."""
        sharing = self.get_tp_size()
        if sharing == 1:
            return self.accelerator.gather_for_metrics(rows)
        every = self.accelerator.gather(rows.contiguous()).unflatten(0, (self.accelerator.num_processes, -1))
        state, every = self.accelerator.gradient_state, every[::sharing].flatten(0, 1)
        return every[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else every

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._metric_prefix = metric_key_prefix
        self._metrics["eval"].clear()
        self._forget("eval")  # what `predict` has left
        self._evaluated.clear()
        self._tell_engine()
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # the summary of training comes in eval mode where the last step was evaluated
        mode = "train" if self._network.training or "train_runtime" in logs else "eval"
        rewards = self._rewards[mode].flush(self._sum_over_processes, self._largest_over_processes)
        extra = rewards | self._phase_metrics(mode)
        if mode == "eval":
            # TRL calls every evaluation set's metrics eval_accuracy, ..., so that of several sets the last one wins.
            means = {key: sum(values) / len(values) for key, values in self._metrics["eval"].items()}
            logs.update({f"{self._metric_prefix}_{key}": value for key, value in (means | extra).items()})
            self._metrics["eval"].clear()
            if self._evaluated and f"{self._metric_prefix}_loss" in logs:
                # transformers' is a mean of batches' means, and of several processes' last batch the first one's alone
                logs[f"{self._metric_prefix}_loss"] = torch.cat(self._evaluated).cpu().double().mean().item()
            self._evaluated.clear()
        else:
            extra |= {f"long_pairs/{name}": f.long for name, f in self._streams.items() if f.long}
            logs.update(extra if rewards else {})
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        with self._even_shards():
            return super().evaluation_loop(*args, **kwargs)

    def _tell_engine(self) -> None:
        if self.is_deepspeed_enabled and partitions():
            hold_experts(self._network)

    def _even_shards(self) -> contextlib.AbstractContextManager:
        """While accelerate shards the model: its plugin has no argument for how FSDP2 cuts a parameter."""
        return balanced_shards() if self.is_fsdp_enabled else contextlib.nullcontext()

    # ---- training ----------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        if reward_normalization(self._network) is not None:
            warnings.warn(
                "the model's reward normalisation describes it before this training and is dropped; measure it again "
                "afterwards: trainer.normalize_rewards().",
                stacklevel=2,
            )
            set_reward_normalization(self._network, None)
        self._tell_engine()
        with self._even_shards():
            return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._read_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # which has loaded the weights past the function above
            self._read_checkpoint(checkpoint)
            own_steps(self.optimizer)

    def _read_checkpoint(self, folder: str) -> None:
        """What of a checkpoint is neither weights nor optimizer; raises if it is of another phase or configuration."""
        path = Path(folder) / "config.json"
        if path.is_file():
            follow_share(self._network)
            _check_same(json.loads(path.read_text()), self._network.config, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; but a model that processes share is always saved, and whole in none of them.

        transformers gathers it in the first process, or saves nothing where the engine's settings keep it sharded. Of
        checkpoints, that is the engine's own business and stays so.
        """
        model = self.accelerator.unwrap_model(self._network)
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers
        if _internal_call or not engine or hasattr(model, "peft_config") or not is_sharded(model):
            super().save_model(output_dir, _internal_call)
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        save_shared(model, folder)
        if self.args.should_save:
            if self.processing_class is not None:
                save_tokenizer(self.processing_class, folder)
            torch.save(self.args, Path(folder) / "training_args.bin")
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @torch.no_grad()
    def normalize_rewards(self, dataset=None) -> RewardNormalization:
        """Measures mean and standard deviation of the rewards over a data set and keeps them in the model.

        Args:
            dataset: preference pairs in any format that TRL takes; None is the training set.

        Returns:
            What `model.config` now holds (`ummrm.reward_normalization`); it is saved and merged with the model.
        """
        if dataset is None:
            dataset = self.train_dataset
        else:
            dataset = self._prepare_dataset(dataset, self.processing_class, self.args, "normalization")
        model, rewards = self._network, []
        with evaluation_mode(model):
            for batch in self.get_eval_dataloader(dataset):
                batch = self._prepare_inputs(batch)
                batch.pop("margin", None)
                pairs = torch.stack(score(model, batch).chunk(2), dim=1)  # by pair, as the loader counts
                rewards.append(self._gathered_rows(pairs).cpu().double().flatten())
        normalization = of_rewards(torch.cat(rewards))
        set_reward_normalization(self._network, normalization)
        if hasattr(model, "peft_config"):
            warnings.warn(
                "saving adapters saves no model configuration, so the reward normalisation stays in this process: fold "
                "the adapters in (merge_and_unload) and save that model, or set_reward_normalization on it later.",
                stacklevel=2,
            )
        return normalization

    # ---- the card ----------------------------------------------------------------------------------------------

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # as TRL's
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / card.FILE
            text = path.read_text(encoding="utf-8")
            # TRL names a local base model "None"
            base = card.base_model_text(getattr(self._network.config, "umm_base_model", None))
            text = text.replace("[None](https://huggingface.co/None)", base)
            text = text.replace('pipeline(model="None"', 'pipeline(model="path/of/this/folder"')
            path.write_text(f"{text}\n\n{self.training_notes()}", encoding="utf-8")

    def training_notes(self) -> str:
        """Markdown on what this trainer did: data, settings, and the last logged metrics."""
        data: Any = self.train_dataset
        names: dict[str, object] = {f"{type(self).__name__} data": _dataset_name(data)}
        if hasattr(data, "__len__"):
            names[self._unit] = len(data)
        names |= {f"over-long {self._unit}, {name}": f"{d.long} of {d.total}" for name, d in self.long_pairs.items()}
        names |= {"steps": self.state.global_step, "learning rate": self.args.learning_rate}
        names |= {f"{self._unit} per step": self.args.train_batch_size * self.args.gradient_accumulation_steps}
        metrics: dict[str, float] = {}
        for entry in self.state.log_history:
            metrics |= {k: v for k, v in entry.items() if not _UNINTERESTING.search(k) and isinstance(v, (int, float))}
        text = f"## {self._name} training\n\n" + card.settings_table(names)
        return text + (f"\n\n{card.metrics_table(metrics)}\n" if metrics else "\n")


def _columns(dataset) -> list[str]:
    return list(dataset.column_names or next(iter(dataset)).keys())


def _dataset_name(dataset) -> str:
    info = getattr(dataset, "info", None)
    return getattr(info, "dataset_name", None) or "given in memory"


def _check_same(saved: Mapping[str, object], config, path: str) -> None:
    """A checkpoint of another phase or configuration would load with holes, which transformers only logs."""
    for key in ("umm", "umm_phase", "umm_merge"):
        theirs, ours = (_without_evaluation(one) for one in (saved.get(key), getattr(config, key, None)))
        if key == "umm_phase":
            theirs = theirs or ("mixture" if "umm" in saved else "none: a dense model")
            ours = ours or "none: a dense model"
        if theirs != ours:
            if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
                names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
                theirs, ours = ({name: one.get(name) for name in names} for one in (theirs, ours))
            raise ValueError(
                f"`resume_from_checkpoint` must be of the model that is trained, and {path} has {key}={theirs!r} where "
                f"the model has {ours!r}; resume with the trainer and the configuration that wrote it."
            )


def _without_evaluation(settings: Any) -> Any:
    """What outside training is computed says nothing of what is trained."""
    return {k: v for k, v in settings.items() if k != "evaluation"} if isinstance(settings, Mapping) else settings


def phase_of(model: nn.Module) -> str | None:
    """`"mixture"`, `"merging"`, or None for a model without experts."""
    return "mixture" if upcycled_ffns(model) else "merging" if merging_ffns(model) else None
