"""accumulate_in_place under DDP and FSDP2: the gradients of plain accumulation, and projections' are added in place."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import make_batch, make_model

from ummrm import UpcycledFFN, ops
from ummrm.ops import autograd


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def added(monkeypatch):
    """How many buffers backward has added to."""
    found = []
    totals_of = autograd.grad_sums.totals_of

    def count(*arguments):
        totals = totals_of(*arguments)
        found.extend(total for total in totals if total is not None)
        return totals

    monkeypatch.setattr(autograd.grad_sums, "totals_of", count)
    return found


def train(moe, wrapped, without_sync, in_place):
    """Gradients of three micro-batches, of which the last synchronises."""
    for i in range(3):
        batch = {name: value.roll(i, 0) for name, value in make_batch().items()}
        with contextlib.ExitStack() as stack:
            if i < 2:
                stack.enter_context(without_sync())
            if in_place:
                stack.enter_context(ops.accumulate_in_place())
            wrapped(**batch).logits.square().mean().backward()
    grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


@contextlib.contextmanager
def unsharded(moe):
    moe.set_requires_gradient_sync(False)
    yield
    moe.set_requires_gradient_sync(True)


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_gradients_are_those_of_plain_accumulation(alone, added, kind):
    def run(in_place):
        moe = make_model()
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(moe)
            return train(moe, wrapped, wrapped.no_sync, in_place)
        if kind == "fsdp2":
            mesh = init_device_mesh("cpu", (1,))
            for layer in moe.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(moe, mesh=mesh)
            return train(moe, moe, lambda: unsharded(moe), in_place)
        return train(moe, moe, contextlib.nullcontext, in_place)

    plain = run(in_place=False)
    assert not added
    grads = run(in_place=True)
    layers = sum(isinstance(module, UpcycledFFN) for module in make_model().modules())
    assert len(added) == 2 * 4 * layers  # the second and third micro-batch, up and down of both kinds
    assert grads.keys() == plain.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-6, msg=name)
