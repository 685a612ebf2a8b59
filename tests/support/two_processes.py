"""What tests of two CPU processes share: how they meet, a model of distinct experts, and a batch of unequal halves."""

from datetime import timedelta

import torch
import torch.distributed as dist
from tiny_models import padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig

CONFIG = UpcycleConfig(
    num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1, balancing_loss_coef=0.3
)


def make_model(config=CONFIG):
    torch.manual_seed(0)
    return perturb_experts(ummrm.upcycle(tiny_model("llama"), config)).train()


def make_batch():
    torch.manual_seed(1)
    return padded_batch(lengths=(9, 2, 7, 1))  # the halves hold different numbers of live tokens


def meet(rank, folder):
    """One of two processes. They meet at a file, not a TCP port: no race for the port, no store that dies with the
    process that ends first."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=15)
    )
    torch.set_num_threads(1)


def half_of(batch, rank):
    return {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
