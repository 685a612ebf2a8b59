"""Auxiliary losses in transformers' own Trainer: an accumulated step is one large batch's."""

import pytest
import torch
from datasets import Dataset
from tiny_models import perturb_experts, tiny_model
from transformers import Trainer, TrainingArguments

import ummrm
from ummrm import UpcycleConfig
from ummrm.nn.losses import share_of_step


def test_share_of_step():
    labels = torch.tensor([[3, -100, 4], [-100, 5, 6]])
    assert share_of_step(labels, None, True) == share_of_step(None, 4, True) == 1
    assert share_of_step(labels, 8, False) == 4 / 8 and share_of_step(labels, 12, True) == 3 / 12
    assert share_of_step(torch.tensor([1.0, 0.0]), torch.tensor(8), False) == 2 / 8


def router_update(folder, batches):
    """Change of the first layer's router after one step over eight sequences in `batches` batches, and the loss."""
    torch.manual_seed(0)
    # The z-loss is a mean over tokens, so equal batches average to the large batch's exactly; balancing does not.
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=1.0, balancing_loss_coef=0.0
    )
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama", "ForCausalLM"), config))
    router = moe.model.layers[0].mlp.router.weight
    before = router.detach().clone()
    ids = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 6} for row in ids])
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=1, per_device_train_batch_size=8 // batches, learning_rate=1e-3,
        gradient_accumulation_steps=batches, optim="sgd", max_grad_norm=0.0, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(moe, arguments, train_dataset=data)
    trainer.train()
    return router.detach() - before, trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("batches", [2, 4])
def test_accumulated_batches_count_as_one(tmp_path, batches):
    (whole, loss), (parts, accumulated) = router_update(tmp_path / "1", 1), router_update(tmp_path / "n", batches)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-8)
    assert accumulated == pytest.approx(loss, rel=1e-4)
