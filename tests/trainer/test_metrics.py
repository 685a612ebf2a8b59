"""What the trainers log between steps stays on the device: meta tensors, which have no values to read, count too."""

import pytest
import torch

from ummrm.nn.losses import RoutingReport
from ummrm.trainer.metrics import RewardMetrics, RoutingMetrics


def same(values):
    """What one process has over all."""
    return values


def report(device="cpu"):
    scalars = [torch.rand((), device=device) for _ in range(4)]
    return RoutingReport(*scalars[:3], torch.rand(4, device=device), scalars[3], torch.full((), 5.0, device=device))


@pytest.fixture
def reads(monkeypatch):
    """The names of the calls that made the host wait for the device."""
    calls = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


def test_nothing_leaves_the_device_before_a_log(reads):
    rewards, routing = RewardMetrics(), RoutingMetrics()
    for _ in range(3):
        rewards.add(torch.empty(6, 1, device="meta"))
        rewards.add_pairs(torch.empty(3, 2, device="meta"))
        routing.add({"layers.0.mlp": report("meta"), "layers.1.mlp": report("meta")})
    assert reads == []


def test_a_log_reads_the_device_once(reads):
    rewards, routing, batches = RewardMetrics(), RoutingMetrics(), [torch.randn(n, 2) for n in (6, 1, 3)]
    for batch in batches:
        rewards.add_pairs(batch)
        routing.add({f"layers.{i}.mlp": report() for i in range(5)})
    got = rewards.flush(same, same)
    assert len(reads) == 1
    assert "z_loss/layer_4" in routing.flush(per_layer=True) and len(reads) == 2
    every = torch.cat(batches).double()
    expected = {
        "min_reward": every.min(),
        "mean_reward": every.mean(),
        "max_reward": every.max(),
        "std_reward": every.std(correction=0),
        "accuracy": (every[:, 0] > every[:, 1]).double().mean(),
        "margin": (every[:, 0] - every[:, 1]).mean(),
    }
    assert got == {name: pytest.approx(value.item(), rel=1e-12) for name, value in expected.items()}
    assert rewards.flush(same, same) == routing.flush(per_layer=True) == {}


def test_long_sums_lose_nothing():
    """In fp32, 2^24 tokens and one more are 2^24."""
    rewards, routing = RewardMetrics(), RoutingMetrics()
    big, one = (torch.full((), float(n)) for n in (2**24, 1))
    zero, shares = torch.zeros(()), torch.full((2,), 0.5)
    routing.add({"0": RoutingReport(zero, zero, zero, shares, zero, big)})
    for _ in range(64):
        routing.add({"0": RoutingReport(one * 2**18, one, one, shares, one, one)})
        rewards.add(torch.tensor([1e4, 1e4 + 1]))
    expected = 64 / (2**24 + 64)
    assert routing.flush(per_layer=False)["z_loss"] == pytest.approx(expected, rel=1e-12)
    assert rewards.flush(same, same)["std_reward"] == pytest.approx(0.5, rel=1e-6)
