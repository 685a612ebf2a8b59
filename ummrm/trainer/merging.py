"""Learning the merge weights: TRL's RewardTrainer on a model whose alpha (and lambda) alone is trained."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from trl import RewardConfig, RewardTrainer

from ..config import MergeConfig
from ..hf.ensembles import check_reward_model
from ..hf.merge_share import merge_share
from ..hf.sharding import check_runs, gathered
from ..hf.tokenizers_v4 import save_tokenizer
from ..merge import merge, prepare_merge, save_merged
from ..nn.dense import PROJECTIONS
from ..nn.merge_weights import LEARNED
from ..nn.merging_linear import merging_parts
from ..nn.modes import evaluation_mode
from ..nn.routing_statistics import RoutingStatistics, record_routing_statistics
from ..nn.upcycled_linear import mixture_parts
from .base import UmmTrainer, phase_of
from .metrics import averaged, labelled, normalized_entropy

# What every study of the laboratory learns alpha with. Largest |alpha| of a tiny model after 20 steps: 0.36, after 100:
# 1.5; at RewardConfig's 1e-4 0.0007 and 0.003.
LEARNING_RATE = 5e-2


@dataclass
class UmmMergeConfig(RewardConfig):
    """`trl.RewardConfig` with a learning rate that moves alpha: 0.05.

    RewardConfig's default, 1e-4, is one for weights: alpha would stay where it starts.
    """

    learning_rate: float = field(default=LEARNING_RATE, metadata={"help": "The initial learning rate of alpha."})


class UmmMergeTrainer(UmmTrainer):
    """`trl.RewardTrainer` for the merge phase: everything but alpha (and lambda, if learned) is frozen.

    Takes every argument and data format of `RewardTrainer` but `peft_config`. A model in its mixture phase is put
    into its merge phase, in place (`ummrm.prepare_merge`); one that is there already (a checkpoint of this trainer)
    goes on as it is. With `alpha_init="routing"` routing is measured on the first batches of the training set, unless
    `statistics` are given. Neither alpha nor lambda is decayed.

    Logged beside TRL's metrics: `lambda`, `merge_entropy` and `max_merge_share` (of softmax(alpha): how far the merge
    has left uniform), each also as `<metric>/layer_<i>`, and every `alpha/layer_<i>/expert_<e>` (with the projection in
    between under `alpha_per="projection"`).

    Args:
        model: an upcycled model, the path of one, in either phase.
        args: `UmmMergeConfig` or `RewardConfig`, left as it is; by default one that saves to `<model>-Merge`. A
            RewardConfig with RewardConfig's default learning rate gets that of `UmmMergeConfig`.
        rest: further positional arguments of `RewardTrainer`.
        merge_config: lambda, start and granularity of alpha; the default is `MergeConfig()`.
        statistics: measured routing statistics for `alpha_init="routing"`.
        statistics_batches: how many batches of `per_device_train_batch_size` pairs to measure it on otherwise.
        log_layers: False leaves out the per-layer entries of the log.
        kwargs: keyword arguments of `RewardTrainer`.

    Raises:
        TypeError: the model is dense or wrapped by PEFT.
        ValueError: `merge_config` differs from that of a model already in its merge phase; `peft_config` is given; an
            optimizer is given before alpha exists; `statistics` is given without `alpha_init="routing"`.

    Warns:
        UserWarning: a learning rate that nobody set was replaced by the merge phase's own.
    """

    _name = "UMM-RM merge"
    _config_class = UmmMergeConfig
    _output_suffix = "Merge"

    def __init__(
        self,
        model,
        args: RewardConfig | None = None,
        *rest,
        merge_config: MergeConfig | None = None,
        statistics: RoutingStatistics | None = None,
        statistics_batches: int = 32,
        log_layers: bool = True,
        **kwargs,
    ) -> None:
        if kwargs.get("peft_config") is not None:
            raise ValueError(
                "`peft_config` must be None: the merge phase trains alpha alone. Train adapters before, with "
                "UmmRewardTrainer, and fold them into the experts with merge_and_unload()."
            )
        if merge_config is not None and not isinstance(merge_config, MergeConfig):
            raise TypeError(f"`merge_config` must be a MergeConfig, got {type(merge_config).__name__}.")
        measured = (merge_config or MergeConfig()).alpha_init == "routing"
        if statistics is not None and not measured:
            raise ValueError(
                '`statistics` must be None unless merge_config has alpha_init="routing"; drop it or set that.'
            )
        if measured and statistics is None and (not isinstance(statistics_batches, int) or statistics_batches < 1):
            raise ValueError(f"`statistics_batches` must be an integer of at least 1, got {statistics_batches!r}.")
        self._merge_config = merge_config
        args = self._own_args(model) if args is None else args
        call = inspect.signature(RewardTrainer.__init__).bind_partial(self, model, args, *rest, **kwargs).arguments
        if call.get("optimizers", (None,))[0] is None and call.get("optimizer_cls_and_kwargs") is None:
            args = _with_a_rate_for_alpha(args)
        super().__init__(model, args, *rest, log_layers=log_layers, **kwargs)
        if phase_of(self._network) == "mixture":
            if self.optimizer is not None:
                raise ValueError(
                    "`optimizers` must not be given with a model of the mixture phase, which has no alpha yet; "
                    "call ummrm.prepare_merge(model, merge_config) first and build the optimizer on what requires a "
                    "gradient, or set `optim` in RewardConfig."
                )
            if merge_config is not None:
                merge_config.resolved(next(iter(mixture_parts(self._network).values())).config)  # before measuring
            if measured and statistics is None:
                statistics = self._measured_statistics(statistics_batches)
            prepare_merge(self._network, merge_config, statistics)
        self._alpha = labelled(merging_parts(self._network))

    def _check_model(self, model: nn.Module) -> None:
        phase = phase_of(model)
        if phase is None or hasattr(model, "peft_config"):
            remedy = "upcycle it first: ummrm.upcycle(model, UpcycleConfig())"
            if phase is not None:
                remedy = "fold its adapters first: model.merge_and_unload()"
            raise TypeError(f"`model` must be an upcycled model, got a {type(model).__name__}; {remedy}.")
        check_reward_model(model, "model")
        share, given = merge_share(model), self._merge_config
        if share is None or given is None:
            return
        if given.resolved(next(iter(merging_parts(model).values())).config) != share.merge_config:
            raise ValueError(
                f"`merge_config` must be that of the model, which is in its merge phase already with "
                f"{share.merge_config}, got {given}; leave it out to go on, or start again from the model of the "
                "mixture phase."
            )

    @torch.no_grad()
    def _measured_statistics(self, batches: int) -> RoutingStatistics:
        size = self.args.per_device_train_batch_size
        model, data = self._network, cast(Any, self.train_dataset)
        check_runs(model)
        if hasattr(data, "__len__"):
            data = Subset(data, range(min(len(data), batches * size)))
        loader = DataLoader(data, batch_size=size, collate_fn=self.data_collator)  # in order: no random state is used
        with evaluation_mode(model), record_routing_statistics(model) as statistics:
            for _, batch in zip(range(batches), loader, strict=False):
                batch = self._prepare_inputs(batch)
                batch.pop("margin", None)
                model(**batch)
        return statistics

    def get_decay_parameter_names(self, model) -> list[str]:
        """None: a decayed alpha would be pulled to the uniform merge, and lambda to one half."""
        return []

    def create_optimizer(self, *args, **kwargs):
        """As in transformers. Without the group of what is decayed under FSDP, where torch restores no empty group."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if self.is_fsdp_enabled:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _phase_metrics(self, mode: str) -> dict[str, float]:
        layers: dict[str, dict[str, float]] = {}
        metrics: dict[str, float] = {}
        first = next(iter(self._alpha.values()))
        learned = gathered(*self._alpha.values(), first._share[0], names=LEARNED)
        with torch.no_grad(), learned:
            for label, ffn in self._alpha.items():
                alpha = ffn.alpha.detach().float().cpu()
                rows = alpha if alpha.dim() == 2 else alpha[None]
                names = [f"{p}/" for p in PROJECTIONS[-len(rows) :]] if alpha.dim() == 2 else [""]
                shares = rows.softmax(-1).tolist()
                layers[label] = {
                    "merge_entropy": sum(normalized_entropy(row) for row in shares) / len(shares),
                    "max_merge_share": max(max(row) for row in shares),
                }
                if self.log_layers and mode == "train":
                    for name, row in zip(names, rows.tolist(), strict=True):
                        metrics |= {f"alpha/{label}/{name}expert_{e}": value for e, value in enumerate(row)}
            share = first.coefficients()[0, : first.config.num_shared_experts].sum().item()
        return {"lambda": share} | averaged(layers, self.log_layers) | metrics

    def merge(self):
        """The merged, stock model with the weights learned so far; its card says how this training went."""
        return merge(self.accelerator.unwrap_model(self.model), card_notes=self.training_notes())

    def save_merged(self, save_directory: str) -> None:
        """Saves the merged model, its card and the tokenizer: a folder that stock tools load as a reward model.

        Every process calls it. Of a model that they share (FSDP2, ZeRO-3) none ever holds a whole one: merged layer by
        layer, straight into the files.
        """
        save_merged(self.accelerator.unwrap_model(self.model), save_directory, card_notes=self.training_notes())
        if self.is_world_process_zero():
            assert self.processing_class is not None  # RewardTrainer makes one from the model's name
            save_tokenizer(self.processing_class, save_directory)


def _with_a_rate_for_alpha(args: RewardConfig) -> RewardConfig:
    """`args`, or a copy with the merge phase's learning rate where its own is the one that RewardConfig has unasked."""
    default = next(f.default for f in fields(RewardConfig) if f.name == "learning_rate")
    if isinstance(args, UmmMergeConfig) or args.learning_rate != default:
        return args
    if args.process_index == 0:
        warnings.warn(
            f"`args` has RewardConfig's default learning rate, {default:g}, at which alpha stays where it starts; the "
            f"merge phase's own, {LEARNING_RATE:g}, is used instead. Set another one in RewardConfig, or insist with "
            f"UmmMergeConfig(learning_rate={default:g}).",
            stacklevel=3,
        )
    args = copy.copy(args)
    args.learning_rate = LEARNING_RATE
    return args
