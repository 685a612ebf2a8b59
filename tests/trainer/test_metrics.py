"""What the trainers log between steps stays on the device: meta tensors, which have no values to read, count too."""

import pytest
import torch

from ummrm.nn.losses import RoutingReport
from ummrm.trainer.metrics import RewardSpread, RoutingMetrics


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
    spread, routing = RewardSpread(), RoutingMetrics()
    for _ in range(3):
        spread.add(torch.empty(6, 1, device="meta"))
        routing.add({"layers.0.mlp": report("meta"), "layers.1.mlp": report("meta")})
    assert reads == []


def test_a_log_reads_the_device_once(reads):
    spread, routing, batches = RewardSpread(), RoutingMetrics(), [torch.randn(6, 1) for _ in range(3)]
    for batch in batches:
        spread.add(batch)
        routing.add({f"layers.{i}.mlp": report() for i in range(5)})
    got = spread.flush(lambda sums: sums)["std_reward"]
    assert len(reads) == 1
    assert "z_loss/layer_4" in routing.flush(per_layer=True) and len(reads) == 2
    assert got == pytest.approx(torch.cat(batches).double().std(correction=0).item(), rel=1e-12)
    assert spread.flush(lambda sums: sums) == routing.flush(per_layer=True) == {}


def test_long_sums_lose_nothing():
    """In fp32, 2^24 tokens and one more are 2^24."""
    spread, routing = RewardSpread(), RoutingMetrics()
    big, one = (torch.full((), float(n)) for n in (2**24, 1))
    zero, shares = torch.zeros(()), torch.full((2,), 0.5)
    routing.add({"0": RoutingReport(zero, zero, zero, shares, zero, big)})
    for _ in range(64):
        routing.add({"0": RoutingReport(one * 2**18, one, one, shares, one, one)})
        spread.add(torch.tensor([1e4, 1e4 + 1]))
    expected = 64 / (2**24 + 64)
    assert routing.flush(per_layer=False)["z_loss"] == pytest.approx(expected, rel=1e-12)
    assert spread.flush(lambda sums: sums)["std_reward"] == pytest.approx(0.5, rel=1e-6)
