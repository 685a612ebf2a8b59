"""Training the mixture: TRL's RewardTrainer with the routers' auxiliary losses, or with groups drawn for each step."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..hf.ensembles import check_reward_model
from ..nn.assignment import draw_groups, sequence_modules
from ..nn.losses import routing_reports
from ..nn.upcycled_ffn import upcycled_ffns
from ..nn.upcycled_linear import UpcycledLinear
from .base import UmmTrainer, phase_of
from .metrics import RoutingMetrics

_SHARE = "share_of_step"  # of a batch: how much its loss counts beside those of the step's other batches


class UmmRewardTrainer(UmmTrainer):
    """`trl.RewardTrainer` for an upcycled model: auxiliary losses added and logged, routing logged.

    Takes every argument and data format of `RewardTrainer` (prompts implicit or explicit, conversations, tokenised
    pairs, `margin`, `center_rewards_coefficient`, `peft_config`, ...). The loss is TRL's plus the weighted auxiliary
    losses of the model's `UpcycleConfig`; `loss` in the logs is the sum, `preference_loss` TRL's part. Evaluation loss
    is TRL's alone.

    For a mixture assigned by sequence there are no routers and no auxiliary losses: every optimiser step deals its
    pairs, over all micro-batches and processes, to the experts (`ummrm.draw_groups` of `args.seed` and the step), so
    that accumulation, several processes and resuming change nothing, and each counts by its number of pairs, so that
    unequal batches change nothing either. An expert that gets 1/E of the pairs has 1/E of the gradient; nothing is
    rescaled. Evaluation goes by the model's `evaluation` setting: the members' mean.

    Under gradient accumulation a batch's auxiliary loss counts by its share of the step's live tokens, over all
    processes: the z-loss and the routers' mean probabilities are then exactly those of the whole step. The balancing
    loss is a product of two means; each batch uses its own slot fractions, so it is the token-weighted mean of the
    batches' losses, and equals the unaccumulated one where the batches route alike.

    Logged beside TRL's metrics: `aux_loss` (weighted), `load_balancing_loss`, `z_loss`, `shared_weight`,
    `max_expert_share`, `expert_entropy`, as means over layers and as `<metric>/layer_<i>`; `std_reward`; over-long
    pairs as a warning and in `trainer.long_pairs`.

    Args:
        model: an upcycled model (`ummrm.upcycle`), the path of one, or a `PeftModel` around one.
        args: `RewardConfig`.
        rest: further positional arguments of `RewardTrainer`.
        log_layers: False leaves out the per-layer entries of the log.
        kwargs: keyword arguments of `RewardTrainer`.

    Raises:
        TypeError: the model is dense, in its merge phase, or has no reward head.
        ValueError: the model has several labels.

    Warns:
        UserWarning: adapters leave linear layers with experts frozen.
    """

    _name = "UMM-RM mixture"

    def __init__(self, model, args=None, *rest, log_layers: bool = True, **kwargs) -> None:
        self._routing = {"train": RoutingMetrics(), "eval": RoutingMetrics()}
        self._preference: list[torch.Tensor] = []
        self._step_tokens: torch.Tensor | None = None
        super().__init__(model, args, *rest, log_layers=log_layers, **kwargs)
        if hasattr(self._network, "peft_config"):
            _warn_of_frozen_members(self._network)

    def _check_model(self, model: nn.Module) -> None:
        phase = phase_of(model)
        if phase != "mixture":
            remedy = (
                "it is in its merge phase: use UmmMergeTrainer"
                if phase == "merging"
                else "upcycle it first: ummrm.upcycle(model, UpcycleConfig()), or train it dense with trl.RewardTrainer"
            )
            raise TypeError(f"`model` must be an upcycled model, got a {type(model).__name__}; {remedy}.")
        check_reward_model(model, "model")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_tokens = None
        if batches and sequence_modules(self._network):  # none at the end of a stream
            self._assign(batches)
        elif len(batches) > 1:
            counts = torch.stack([_tokens(batch).to(device) for batch in batches])
            self._step_tokens = self.accelerator.reduce(counts.sum().float(), "sum")
        return batches, num_items

    def _assign(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Gives each batch its part of the step's groups: rows are all chosen answers, then all rejected ones."""
        own = torch.tensor([batch["input_ids"].shape[0] // 2 for batch in batches])
        counts, rank = own[None], 0
        if self.accelerator.num_processes > 1:
            sharing = self.get_tp_size()  # processes of a tensor-parallel group have one batch, and so one group a row
            counts = self.accelerator.gather(own.to(self.accelerator.device)).cpu().view(-1, len(batches))[::sharing]
            rank = self.accelerator.process_index // sharing
        ends = counts.t().flatten().cumsum(0).view(len(batches), -1)[:, rank]
        config = next(iter(sequence_modules(self._network).values())).config
        step = self.state.global_step
        groups = draw_groups(int(counts.sum()), config.num_experts, seed=self.args.seed, step=step)
        for batch, count, end in zip(batches, own.tolist(), ends.tolist(), strict=True):
            batch["groups"] = groups[end - count : end].repeat(2).to(batch["input_ids"].device)
            # a step's loss is the mean of those of its batches and processes, which may have fewer pairs than others
            batch[_SHARE] = count * counts.numel() / counts.sum().item()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        share = inputs.pop(_SHARE, 1.0)
        if not self._network.training and self._routes():
            self._leave_out_fillers(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss if share == 1.0 else loss * share
        return (loss, outputs) if return_outputs else loss

    def _routes(self) -> bool:
        return any(ffn.router is not None for ffn in upcycled_ffns(self._network).values())

    def _leave_out_fillers(self, inputs: dict[str, torch.Tensor]) -> None:
        """Masks the pairs that fill up the last batch of an evaluation by several processes, for the statistics.

        Their rewards are dropped when they are gathered.
        """
        state, pairs = self.accelerator.gradient_state, inputs["input_ids"].shape[0] // 2
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return
        batch = self.accelerator.process_index // self.get_tp_size()  # which processes may share
        own = min(max(state.remainder - batch * pairs, 0), pairs)
        if own < pairs:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            inputs["token_mask"] = mask.bool() & (torch.arange(2 * pairs, device=ids.device) % pairs < own)[:, None]

    def _extra_loss(self, model: nn.Module, loss: torch.Tensor, mode: str) -> torch.Tensor:
        reports = routing_reports(model)
        if not reports:  # assigned by sequence: no routers
            return loss
        self._routing[mode].add(reports)
        if mode == "eval":
            return loss
        self._preference.append(loss.detach())
        auxiliary = torch.stack([r.loss for r in reports.values()]).mean()
        if self._step_tokens is not None:
            # The trainer divides by the number of batches in the step, which is right for means over equally many
            # pairs; means over tokens count by tokens.
            live = next(iter(reports.values())).live_tokens
            auxiliary = auxiliary * self.current_gradient_accumulation_steps * live / self._step_tokens.clamp_min(1)
        return loss + auxiliary.to(loss)

    def _forget(self, mode: str) -> None:
        super()._forget(mode)
        self._routing[mode] = RoutingMetrics()

    def _phase_metrics(self, mode: str) -> dict[str, float]:
        metrics = self._routing[mode].flush(self.log_layers)
        if mode == "train" and self._preference:
            mean = torch.stack(self._preference).mean()  # every process has seen equally many batches
            metrics["preference_loss"] = self._sum_over_processes(mean).item() / self.accelerator.num_processes
            self._preference.clear()
        return metrics


def _warn_of_frozen_members(model: nn.Module) -> None:
    """Adapters on FFNs alone would leave the members' other linear layers copies of each other."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = []
    for name, module in model.named_modules():
        place = name.partition(".base_layer")[0].partition(".original_module")[0]
        if isinstance(module, UpcycledLinear) and not any(one.startswith(f"{place}.") for one in trained):
            frozen.append(place)
    if frozen:
        warnings.warn(
            f"{len(frozen)} linear layers whose experts differ by member have no adapter and are frozen, so that all "
            f"members keep them equal, first {frozen[0]}; add them to `target_parameters`: "
            f'"{frozen[0].rpartition(".")[2]}.expert_weight", ...',
            stacklevel=4,
        )


def _tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
