"""One process of a data-parallel run under torchrun (see test_trainer.py): trains and leaves what came out."""

import sys

import torch
from trl_inputs import CONFIG, SEQUENCE, make_dataset, make_moe, make_tokenizer, settings

from ummrm import UmmRewardTrainer, UpcycleConfig


def train(folder, assignment="token", **batching):
    """One step of plain SGD on 16 pairs, the z-loss alone beside the preference loss; parameters and the log."""
    config = UpcycleConfig(**{**CONFIG.to_dict(), "balancing_loss_coef": 0.0, "z_loss_coef": 1.0})
    config = SEQUENCE if assignment == "sequence" else config
    trainer = UmmRewardTrainer(
        make_moe(config=config),
        settings(folder, max_steps=1, optim="sgd", max_grad_norm=0, **batching),
        train_dataset=make_dataset(16, longest=30),
        eval_dataset=make_dataset(8, 1),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e) | trainer.evaluate()
    entry |= {"normalization": trainer.normalize_rewards(make_dataset(7, 2))}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {n: p.detach() for n, p in model.named_parameters()}, entry, trainer.is_world_process_zero()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parameters, log, first = train(
        *sys.argv[1:], per_device_train_batch_size=2, gradient_accumulation_steps=4, ddp_backend="gloo"
    )
    if first:
        torch.save((parameters, log), f"{sys.argv[1]}/out.pt")
