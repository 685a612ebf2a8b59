"""Data parallelism over two processes gives the auxiliary loss and the gradients of one."""

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig, auxiliary_loss
from ummrm.nn.parallel import sum_over_processes

CONFIG = UpcycleConfig(
    num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1, balancing_loss_coef=0.3
)


def make_model():
    torch.manual_seed(0)
    return perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG)).train()


def make_batch():
    torch.manual_seed(1)
    return padded_batch(lengths=(9, 2, 7, 1))  # the halves hold different numbers of live tokens


def meet(rank, folder):
    """One of two processes. They meet at a file, not a TCP port: no race for the port, no store that dies with the
    process that ends first."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)


def half_of(batch, rank):
    return {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}


def worker(rank, folder):
    meet(rank, folder)
    moe = make_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(moe)
    batch = half_of(make_batch(), rank)
    logits = wrapped(**batch).logits
    auxiliary = auxiliary_loss(moe)
    (logits.square().mean() + auxiliary).backward()
    torch.save((auxiliary.detach(), {n: p.grad for n, p in moe.named_parameters()}), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2, join=True)
    moe = make_model()
    logits = moe(**make_batch()).logits
    auxiliary = auxiliary_loss(moe)
    (logits.square().mean() + auxiliary).backward()
    for rank in range(2):
        other, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(other, auxiliary.detach(), rtol=1e-5, atol=1e-7)
        for name, parameter in moe.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
            assert parameter.grad.abs().max() > 1e-4, name


def test_without_torch_distributed_a_sum_is_the_tensor_itself():
    tensor = torch.randn(3)
    assert sum_over_processes(tensor) is tensor
