"""One process of a distillation under torchrun (see test_distillation.py): distils and leaves what came out."""

import sys

import torch
from ensembles import mixture
from trl_inputs import make_dataset, make_tokenizer, settings

import ummrm
from ummrm import UmmDistillConfig, UmmDistillTrainer


def train(folder, **options):
    """Three steps of plain SGD on 4 texts each, and an evaluation on an odd number of texts; what came out."""
    teacher = mixture()
    trainer = UmmDistillTrainer(
        ummrm.merge(teacher),
        settings(folder, UmmDistillConfig, max_steps=3, optim="sgd", max_grad_norm=0, **options),
        teacher=teacher,
        train_dataset=make_dataset(12, kind="explicit", longest=20),
        eval_dataset=make_dataset(15, 1, kind="explicit"),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "scale": trainer.teacher_scale,
        "targets": trainer.train_dataset["target"][:],
        "metrics": trainer.evaluate(),
        "first": trainer.is_world_process_zero(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = train(sys.argv[1], per_device_train_batch_size=2, ddp_backend="gloo")
    if found["first"]:
        torch.save(found, f"{sys.argv[1]}/out.pt")
