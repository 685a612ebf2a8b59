"""Routing statistics are counted over live tokens, once per forward."""

import pytest
import torch
from tiny_models import padded_batch, perturb_experts, tiny_model
from torch import nn

import ummrm
from ummrm import UpcycleConfig, ops, record_routing_statistics

NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]


def model(**config):
    return perturb_experts(ummrm.upcycle(tiny_model("llama"), UpcycleConfig(**config)))


def test_statistics_count_live_tokens_over_all_forwards():
    moe = model(num_experts=4, num_experts_per_tok=3, router_init_std=0.5)
    batches = [padded_batch(), padded_batch(side="left")]
    routings = []
    moe.model.layers[0].mlp.router.register_forward_hook(lambda m, a, out: routings.append(out))
    with record_routing_statistics(moe) as statistics:
        for batch in batches:
            moe(**batch)
    moe(**batches[0])
    assert statistics.tokens == dict.fromkeys(NAMES, 2 * (9 + 4 + 1))
    indices = torch.cat([r.expert_indices for r in routings[:2]])
    live = indices[:, 0] >= 0
    counts = torch.bincount(indices[live].flatten().long(), minlength=4).double()
    torch.testing.assert_close(statistics.fractions[NAMES[0]], counts / counts.sum())
    shared = torch.cat([r.shared_weight for r in routings[:2]])[live]
    assert statistics.shared_weight[NAMES[0]] == pytest.approx(shared.mean().item(), rel=1e-5)
    gates = torch.zeros(4, dtype=torch.double)
    weights = torch.cat([r.routed_weights for r in routings[:2]])[live].double().detach()
    gates.index_add_(0, indices[live].flatten().long(), weights.flatten())
    torch.testing.assert_close(statistics.gate_shares[NAMES[0]], gates / gates.sum())


def test_recomputation_is_not_counted():
    moe = model(num_experts=3, num_experts_per_tok=2).train()
    moe.gradient_checkpointing_enable()
    with record_routing_statistics(moe) as statistics:
        moe(**padded_batch()).logits.sum().backward()
    assert statistics.tokens == dict.fromkeys(NAMES, 9 + 4 + 1)


def test_nothing_recorded_is_zeros_and_uniform():
    with record_routing_statistics(model(num_experts=4, num_experts_per_tok=1)) as statistics:
        pass
    assert statistics.fractions[NAMES[0]].tolist() == [0] * 4
    assert statistics.gate_shares[NAMES[0]].tolist() == [0.25] * 4
    assert statistics.shared_weight[NAMES[0]] == 0.0


def test_networks_without_experts_are_refused():
    with (
        pytest.raises(TypeError, match="must hold UpcycledFFN modules with routers, got a Linear"),
        record_routing_statistics(nn.Linear(2, 2)),
    ):
        pass


def test_recording_never_waits_for_the_device():
    """Meta tensors have no values that a host could read."""
    logits, mask = torch.empty(9, 4, device="meta"), torch.empty(9, dtype=torch.bool, device="meta")
    with record_routing_statistics(model(num_experts=4, num_experts_per_tok=3)) as statistics:
        for _ in range(2):
            statistics.add(NAMES[0], ops.route(logits, mask, top_k=3))
    with pytest.raises(NotImplementedError):
        statistics.tokens  # noqa: B018  a view has to
