"""The whole road on the device: upcycle, train, learn the merge, merge; the same numbers as on the CPU."""

import copy

import pytest
import torch
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import MergeConfig, UpcycleConfig, auxiliary_loss, preference_loss

CONFIG = UpcycleConfig(num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1)


def to(batch, device):
    return {name: value.to(device) for name, value in batch.items()}


def trained(model, device, chosen, rejected, steps):
    """Plain gradient descent, which does not magnify rounding as Adam's division does; losses of all steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for _ in range(steps):
        rewards = [model(**to(batch, device)).logits for batch in (chosen, rejected)]
        loss = preference_loss(*rewards) + auxiliary_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_training_and_merging_as_on_the_cpu(device, model_type):
    moe = perturb_experts(ummrm.upcycle(tiny_model(model_type), CONFIG))
    chosen, rejected = padded_batch(lengths=(9, 5, 3)), padded_batch(lengths=(4, 8, 2), side="left")
    results = []
    for place in (torch.device("cpu"), device):
        model = copy.deepcopy(moe).to(place)
        losses = trained(model, place, chosen, rejected, 4)
        ummrm.prepare_merge(model, MergeConfig())
        alpha = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(alpha, lr=1.0)
        for _ in range(3):
            rewards = [model(**to(batch, place)).logits for batch in (chosen, rejected)]
            loss = preference_loss(*rewards)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        merged = ummrm.merge(model)
        assert all(p.device.type == place.type for p in merged.parameters())
        results.append((losses, merged.cpu().state_dict(), outputs_of(merged, chosen).detach()))
    (losses, weights, outputs), (losses_there, weights_there, outputs_there) = results
    assert losses[3] != losses[0]
    torch.testing.assert_close(torch.tensor(losses_there), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    assert weights.keys() == weights_there.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weights_there[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(outputs_there, outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_under_autocast(device, checkpointing):
    """fp32 weights under bf16 autocast, as reward-model trainers run: finite, and close to fp32."""
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG)).to(device).train()
    if checkpointing:
        moe.gradient_checkpointing_enable()
    batch = to(padded_batch(lengths=(9, 5, 3)), device)

    def loss():
        logits = moe(**batch).logits
        return preference_loss(logits, logits.flip(0)) + auxiliary_loss(moe)

    exact = loss()
    with torch.autocast(device.type, torch.bfloat16):
        value = loss()
    value.backward()
    torch.testing.assert_close(value.float(), exact.float(), rtol=0.05, atol=0.05)
    for name, parameter in moe.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    assert any("router" in n and p.grad.abs().max() > 0 for n, p in moe.named_parameters() if p.grad is not None)
