"""Training as reward-model trainers do it: fp32 weights under bf16 autocast with activation checkpointing."""

import contextlib
import copy

import pytest
import torch
from tiny_models import padded_batch, perturb_experts, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import ummrm
from ummrm import UpcycleConfig, auxiliary_loss, preference_loss, record_routing_statistics

CONFIG = UpcycleConfig(
    num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1, balancing_loss_coef=0.1
)
NOISY = UpcycleConfig(**{**CONFIG.to_dict(), "router_noise": "learned"})


def training_step(moe, autocast):
    chosen, rejected = padded_batch(lengths=(9, 5, 3)), padded_batch(lengths=(4, 8, 2), side="left")
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        # two forwards before one backward: a recomputation must not see the other forward's mask
        first = moe(**chosen).logits
        auxiliary = auxiliary_loss(moe)
        second = moe(**rejected).logits
        loss = preference_loss(first, second) + auxiliary + auxiliary_loss(moe)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in moe.named_parameters()}


@pytest.mark.parametrize("config", [CONFIG, NOISY], ids=["clean", "noisy"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "bert"])
def test_gradients_with_and_without_checkpointing_are_equal(model_type, autocast, config):
    torch.manual_seed(3)
    plain = perturb_experts(ummrm.upcycle(tiny_model(model_type), config)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    results = []
    for moe in (plain, checkpointed):
        torch.manual_seed(4)  # the same batch, dropout and router noise
        results.append(training_step(moe, autocast))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        if gradient is None:
            assert gradients_again[name] is None, name
            continue
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all(), name
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    routers = [g for n, g in gradients.items() if n.endswith("router.weight")]
    assert routers and all(g.abs().max() > 0 for g in routers)


def test_the_auxiliary_losses_gradient_alone_survives_checkpointing():
    torch.manual_seed(5)
    plain = ummrm.upcycle(tiny_model("llama"), CONFIG).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    gradients = []
    batch = padded_batch()
    for moe in (plain, checkpointed):
        moe(**batch)
        auxiliary_loss(moe).backward()
        gradients.append(moe.model.layers[0].mlp.router.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_statistics_are_those_of_the_forward_not_of_the_recomputation():
    moe = ummrm.upcycle(tiny_model("llama"), CONFIG).train()
    moe.gradient_checkpointing_enable()
    with record_routing_statistics(moe) as statistics:
        first = moe(**padded_batch(lengths=(9, 9)))
        second = moe(**padded_batch(lengths=(4, 3)))
        ffn = moe.model.layers[0].mlp
        before = ffn.statistics
        (first.logits.sum() + second.logits.sum()).backward()
    assert ffn.statistics is before and int(before.tokens_per_expert.sum()) == 2 * (4 + 3)
    assert statistics.tokens["model.layers.0.mlp"] == 9 + 9 + 4 + 3


class SeenDtypes(TorchDispatchMode):
    """Which dtypes the package's kernels were handed, below autograd and autocast."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ummrm":
            name = func._schema.name.removeprefix("ummrm::")
            self.seen.setdefault(name, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", ["mixture", "merging"])
def test_kernels_run_in_bf16_under_autocast_and_routing_in_fp32(phase):
    moe = ummrm.upcycle(tiny_model("llama"), CONFIG).train()
    if phase == "merging":
        ummrm.prepare_merge(moe)
    batch = padded_batch()
    modes = SeenDtypes()
    with modes, torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(**batch).logits
    with modes:
        out.float().sum().backward()
    if phase == "mixture":
        assert modes.seen["moe_ffn_forward"] == modes.seen["moe_ffn_backward"] == {torch.bfloat16}
        assert modes.seen["route"] == {torch.float32}
    else:
        assert modes.seen["merged_ffn_forward"] == modes.seen["merged_ffn_backward"] == {torch.bfloat16}


def test_reentrant_checkpointing_is_refused():
    moe = ummrm.upcycle(tiny_model("llama"), CONFIG)
    with pytest.raises(ValueError, match="`use_reentrant` must be False"):
        moe.gradient_checkpointing_enable({"use_reentrant": True})
    moe.gradient_checkpointing_enable({"use_reentrant": False})
    moe.gradient_checkpointing_disable()


def test_frozen_experts_and_routers_get_no_gradient():
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG)).train()
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_("experts" not in name)
    moe(**padded_batch()).logits.sum().backward()
    for name, parameter in moe.named_parameters():
        assert (parameter.grad is None) == ("experts" in name), name


def test_training_lowers_the_loss_and_moves_the_experts_apart():
    torch.manual_seed(6)
    moe = ummrm.upcycle(tiny_model("llama"), CONFIG).train()
    chosen, rejected = padded_batch(lengths=(9, 5, 3, 8)), padded_batch(lengths=(4, 8, 2, 9))
    optimizer = torch.optim.AdamW(moe.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        loss = preference_loss(moe(**chosen).logits, moe(**rejected).logits) + auxiliary_loss(moe)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    experts = moe.model.layers[0].mlp.experts.gate_up_proj
    assert (experts[0] - experts[1]).norm() > 1e-3 * experts[0].norm()


@pytest.mark.parametrize("phase", ["mixture", "merging"])
def test_a_compiled_ffn_equals_the_eager_one(phase):
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG))
    if phase == "merging":
        ummrm.prepare_merge(moe)
    ffn = moe.model.layers[0].mlp
    x, mask = torch.randn(2, 5, 24, requires_grad=True), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    expected = ffn(x, mask)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    got = compiled(x, mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], wanted, rtol=1e-5, atol=1e-6)
