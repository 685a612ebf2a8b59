"""Data parallelism over two processes gives the auxiliary loss and the gradients of one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from two_processes import half_of, make_batch, make_model, meet

from ummrm import auxiliary_loss
from ummrm.nn.parallel import sum_over_processes


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
