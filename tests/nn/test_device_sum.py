"""Sums on a device: in fp64, or as pairs of fp32 numbers, neither of which forgets small numbers after large ones."""

import pytest
import torch

from ummrm.nn import device_sum
from ummrm.nn.device_sum import DeviceSum, read_all


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_numbers_count_after_large_ones(dtype, monkeypatch):
    monkeypatch.setattr(device_sum, "widest", lambda device: dtype)
    total, empty = DeviceSum(), DeviceSum()
    first = torch.tensor([2.0**24, -(2.0**30), 0.1])
    total.add(first)
    for _ in range(300):
        total.add(torch.tensor([1, 0.25, 0.0], dtype=torch.bfloat16))
    expected = [2.0**24 + 300, -(2.0**30) + 75, first[2].item()]
    assert read_all([empty, total, total]) == [[], expected, expected]
    assert total.value().dtype == dtype and total.value().tolist() == pytest.approx(expected, rel=2e-7)
    assert first.tolist()[0] == 2.0**24 and empty.value() is None
    total.add(torch.tensor([torch.inf, 0.0, 0.0]))
    total.add(torch.ones(3))
    assert total.read()[0] == torch.inf
