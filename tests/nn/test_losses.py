"""Preference and auxiliary losses against their definitions."""

import math

import pytest
import torch
from test_dense import Gated
from tiny_models import padded_batch, perturb_experts, tiny_model
from torch import nn

import ummrm
from ummrm import UpcycleConfig, UpcycledFFN, auxiliary_loss, preference_loss
from ummrm.nn.losses import cv_squared_loss, load_balancing_loss


def test_preference_loss_follows_its_definition():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    margins = [0.0, 0.3]
    for margin in margins:
        expected = sum(math.log1p(math.exp(-(c - r - margin))) for c, r in zip(chosen, rejected, strict=True)) / 3
        assert preference_loss(chosen, rejected, margin).item() == pytest.approx(float(expected), rel=1e-6)
    per_pair = preference_loss(chosen, rejected, torch.tensor([0.1, 0.2, 0.3]))
    assert per_pair > preference_loss(chosen, rejected)


def test_preference_loss_of_low_precision_rewards_is_fp32():
    loss = preference_loss(torch.randn(4).bfloat16(), torch.randn(4).bfloat16())
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((3, 1), (3,))])
def test_preference_loss_refuses_shapes_that_would_broadcast_or_give_nan(shapes):
    with pytest.raises(ValueError, match="same, non-empty shape"):
        preference_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_preference_loss_refuses_a_margin_that_would_broadcast():
    with pytest.raises(ValueError, match=r"`margin` must be a number or have the rewards' shape \[8, 1\], got \[8\]"):
        preference_loss(torch.zeros(8, 1), torch.zeros(8, 1), torch.zeros(8))


def test_load_balancing_is_one_when_balanced_and_e_when_collapsed():
    assert load_balancing_loss(torch.tensor([4, 4, 4]), torch.full((3,), 1 / 3)).item() == pytest.approx(1)
    assert load_balancing_loss(torch.tensor([9, 0, 0]), torch.tensor([1.0, 0, 0])).item() == pytest.approx(3)
    assert load_balancing_loss(torch.zeros(3), torch.zeros(3)).item() == 0


def test_cv_squared_is_zero_when_balanced_and_without_tokens():
    assert cv_squared_loss(torch.full((5,), 0.2)).item() == 0
    assert cv_squared_loss(torch.zeros(5)).item() == 0
    assert cv_squared_loss(torch.tensor([1.0, 0.0])).item() == pytest.approx(1)


@pytest.mark.parametrize("balancing", ["switch", "cv_squared"])
def test_auxiliary_loss_is_the_mean_over_layers_of_the_weighted_definitions(balancing):
    torch.manual_seed(0)
    config = UpcycleConfig(
        num_experts=4,
        num_experts_per_tok=2,
        balancing_loss=balancing,
        balancing_loss_coef=0.3,
        z_loss_coef=0.2,
        router_init_std=0.5,
    )
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), config)).train()
    inputs = {}
    for name, module in moe.named_modules():
        if isinstance(module, UpcycledFFN):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0]))
    batch = padded_batch()
    moe(**batch)
    live = batch["attention_mask"].bool()
    losses = []
    for name, x in inputs.items():
        logits = x[live] @ moe.get_submodule(name).router.weight.T
        p = logits.softmax(-1)
        slots = torch.bincount(p.topk(2, -1).indices.flatten(), minlength=4)
        mean = p.mean(0)
        if balancing == "switch":
            balance = 4 * (slots / slots.sum() * mean).sum()
        else:
            balance = mean.var(correction=0) / mean.mean() ** 2
        losses.append(0.3 * balance + 0.2 * logits.logsumexp(-1).square().mean())
    expected = torch.stack(losses).mean()
    got = auxiliary_loss(moe)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weights = [m.router.weight for m in moe.modules() if isinstance(m, UpcycledFFN)]
    for ours, theirs in zip(
        torch.autograd.grad(got, weights, retain_graph=True), torch.autograd.grad(expected, weights), strict=True
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_batch_of_padding_alone_costs_nothing_and_has_no_nan():
    ffn = UpcycledFFN.from_dense(Gated(torch.nn.functional.silu), UpcycleConfig(num_experts=3, num_experts_per_tok=1))
    ffn(torch.randn(4, 10), token_mask=torch.zeros(4, dtype=torch.bool))
    loss = auxiliary_loss(ffn)
    loss.backward()
    assert loss.item() == 0 and ffn.router.weight.grad.abs().max() == 0


def test_a_task_loss_in_training_includes_the_auxiliary_loss():
    moe = ummrm.upcycle(tiny_model("llama"), UpcycleConfig(num_experts=3, num_experts_per_tok=1, z_loss_coef=0.5))
    batch = {**padded_batch(), "labels": torch.randn(3)}
    plain = moe(**batch).loss
    trained = moe.train()(**batch).loss
    torch.testing.assert_close(trained - plain, auxiliary_loss(moe), rtol=1e-4, atol=1e-5)
    as_tuple = moe(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], trained)


def test_misuse_is_a_clear_error():
    with pytest.raises(TypeError, match=r"must hold UpcycledFFN modules, got a Linear"):
        auxiliary_loss(nn.Linear(2, 2))
    moe = ummrm.upcycle(tiny_model("llama"), UpcycleConfig())
    with pytest.raises(RuntimeError, match="model.layers.0.mlp, model.layers.1.mlp has run none; call the model first"):
        auxiliary_loss(moe)
    with torch.no_grad():
        moe.train()(**padded_batch())
    with pytest.raises(RuntimeError, match="carry no gradient .*use_reentrant"):
        auxiliary_loss(moe)
    with torch.no_grad():
        assert auxiliary_loss(moe).item() > 0
