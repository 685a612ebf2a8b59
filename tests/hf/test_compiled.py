"""Whole upcycled models under torch.compile: one graph, with the loss and the gradients of the eager model."""

import pytest
import torch
from tiny_models import padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig, auxiliary_loss

TOKEN = UpcycleConfig(
    num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1, balancing_loss_coef=0.3
)
KINDS = {
    "token": TOKEN,
    "merging": TOKEN,
    "sequence": UpcycleConfig(assignment="sequence"),
    "all": UpcycleConfig(assignment="sequence", experts_in="all"),
}
FAST = [("llama", "token")]  # by sequence: test_compiled_and_under_autocast
REST = [(family, kind) for family in ("llama", "qwen2", "gpt_neox") for kind in KINDS if (family, kind) not in FAST]


@pytest.mark.parametrize(("family", "kind"), [*FAST, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)])
def test_a_model_compiles_to_one_graph(family, kind):
    torch._dynamo.reset()
    moe = perturb_experts(ummrm.upcycle(tiny_model(family), KINDS[kind]))
    if kind == "merging":
        ummrm.prepare_merge(moe)
    batch = padded_batch(lengths=(9, 2, 7, 1))
    if KINDS[kind].by_sequence:
        batch["groups"] = torch.tensor([2, 0, 1, 3])
    compiled = torch.compile(moe.train(), backend="aot_eager", fullgraph=True)

    def step(run):
        moe.zero_grad()
        loss = run(**batch).logits.square().mean()
        loss = loss + auxiliary_loss(moe) if kind == "token" else loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}

    (loss, gradients), (got, found) = step(moe), step(compiled)
    torch.testing.assert_close(got, loss)
    assert found.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name
    if KINDS[kind].by_sequence:  # the members' mean
        del batch["groups"]
        moe.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, moe(**batch).logits)
