"""FSDP2 over two processes: sharded mixtures train as one process does, in fp32 and in mixed precision, and merge."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import padded_batch, perturb_experts, tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ummrm
from ummrm import MergeConfig, UpcycleConfig, auxiliary_loss

pytestmark = pytest.mark.full

CONFIG = UpcycleConfig(
    num_experts=4, num_experts_per_tok=2, router_init_std=0.5, z_loss_coef=0.1, balancing_loss_coef=0.3
)
LEARNING_RATE = 0.05


def make_model(phase):
    torch.manual_seed(0)
    moe = perturb_experts(ummrm.upcycle(tiny_model("llama"), CONFIG))
    if phase == "merging":
        ummrm.prepare_merge(moe, MergeConfig())
    return moe.train()


def make_batch():
    torch.manual_seed(1)
    return padded_batch(lengths=(9, 2, 7, 1))  # the halves hold different numbers of live tokens


def loss_of(model, batch, phase):
    loss = model(**batch).logits.float().square().mean()
    return loss if phase == "merging" else loss + auxiliary_loss(model)


def step(model, loss):
    """One step of plain gradient descent."""
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(parameters, LEARNING_RATE).step()


def worker(rank, folder, phase, dtype):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    moe = make_model(phase)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in moe.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(moe, mesh=mesh, mp_policy=policy)
    batch = {k: v[2 * rank : 2 * rank + 2] for k, v in make_batch().items()}
    for _ in range(2):
        moe.zero_grad()
        step(moe, loss_of(moe, batch, phase))
    state = get_model_state_dict(moe, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["training", "merging"])
def test_two_shards_train_as_one_process(tmp_path, phase, dtype):
    mp.spawn(worker, args=(str(tmp_path), phase, dtype), nprocs=2, join=True)
    sharded = torch.load(tmp_path / "state.pt")
    moe = make_model(phase)
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    for _ in range(2):
        moe.zero_grad()
        step(moe, loss_of(moe, make_batch(), phase))
    for name, parameter in moe.named_parameters():
        moved = (parameter - before[name]).norm()
        assert sharded[name].dtype == torch.float32, name
        if not parameter.requires_grad:
            assert torch.equal(sharded[name], before[name]), name
            continue
        assert moved > 0, name
        # against how far two steps go: bf16 gradients keep 8 bits of each
        limit = 1e-3 if dtype is None else 0.15
        assert (sharded[name] - parameter).norm() <= limit * moved, name
