"""Router: logits in fp32, noise in training alone, gradients to every parameter."""

import math

import pytest
import torch
import torch.nn.functional as F
from own_networks import HIDDEN, perturbed
from test_dense import Gated

from ummrm import UpcycleConfig, ops
from ummrm.nn.router import Router


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_router_logits_are_fp32_whatever_the_input(kind):
    router = Router(HIDDEN, UpcycleConfig(num_experts=4, num_experts_per_tok=2, router=kind, router_init_std=0.5))
    x = torch.randn(6, HIDDEN, dtype=torch.bfloat16)
    expected = x.double() @ router.weight.double().T
    if kind == "mlp":
        expected = expected.tanh() @ router.output_weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(router.logits(x).double(), expected, rtol=1e-1, atol=1e-1)
        out = router(x)
    assert out.routed_weights.dtype == torch.float32
    torch.testing.assert_close(out.mean_prob.double(), expected.softmax(-1).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", ["jitter", "learned"])
def test_router_noise_is_for_training_and_leaves_the_statistics_clean(noise):
    config = UpcycleConfig(
        num_experts=6, num_experts_per_tok=2, router_noise=noise, jitter_eps=0.9, router_init_std=0.3
    )
    router, x = Router(HIDDEN, config), torch.randn(200, HIDDEN)
    clean = router.eval()(x)
    assert torch.equal(router(x).routed_weights, clean.routed_weights)
    noisy = router.train()(x)
    assert not torch.equal(noisy.routed_weights, clean.routed_weights)
    torch.testing.assert_close(noisy.mean_prob, clean.mean_prob)
    torch.testing.assert_close(noisy.mean_z, clean.mean_z)


def test_learned_noise_starts_at_the_papers_standard_deviation():
    config = UpcycleConfig(num_experts=6, num_experts_per_tok=2, router_noise="learned", router_init_std=0.0)
    router = Router(HIDDEN, config)
    captured = []
    original = ops.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "route", lambda logits, *a, **k: captured.append(logits) or original(logits, *a, **k))
        router(torch.randn(4000, HIDDEN))
    assert captured[0].std().item() == pytest.approx(math.log(2) + 0.01, rel=0.03)


def test_router_gradients_reach_every_router_parameter():
    config = UpcycleConfig(num_experts=4, num_experts_per_tok=2, router="mlp", router_noise="learned")
    moe = perturbed(Gated(F.silu), config)
    moe(torch.randn(20, HIDDEN)).square().sum().backward()
    for name, parameter in moe.router.named_parameters():
        assert parameter.grad.abs().max() > 0, name
