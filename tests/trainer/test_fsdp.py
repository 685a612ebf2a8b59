"""FSDP2 over two processes: sharded mixtures train as one process does, in fp32 and in mixed precision, and merge."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from two_processes import half_of, make_batch, meet
from two_processes import make_model as make_mixture

import ummrm
from ummrm import MergeConfig, UpcycleConfig, auxiliary_loss

pytestmark = pytest.mark.full

LEARNING_RATE = 0.05
LINEAR = UpcycleConfig(assignment="sequence", experts_in="linear")
SHARED = UpcycleConfig(assignment="sequence", num_shared_experts=1, fixed_shared_weight=0.9)
ALL = UpcycleConfig(assignment="sequence", experts_in="all")
MIXTURES = {"by sequence, linear": LINEAR, "by sequence, all": ALL, "by sequence, shared": SHARED}


def make_model(phase):
    if phase in MIXTURES:
        return make_mixture(MIXTURES[phase])
    if phase == "mixture":
        return make_mixture()
    moe = make_mixture(LINEAR) if phase == "merging linear" else make_mixture()
    return ummrm.prepare_merge(moe, MergeConfig(shared_share=0.0 if phase == "merging linear" else 0.9)).train()


def batch_for(phase):
    """By sequence with the group of each row, which is another one in each half."""
    return make_batch() | ({"groups": torch.tensor([2, 0, 1, 3])} if phase in MIXTURES else {})


def loss_of(model, batch, phase):
    loss = model(**batch).logits.float().square().mean()
    return loss + auxiliary_loss(model) if phase == "mixture" else loss


def step(model, loss):
    """One step of plain gradient descent."""
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(parameters, LEARNING_RATE).step()


def worker(rank, folder, phase, dtype):
    meet(rank, folder)
    moe = make_model(phase)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in moe.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(moe, mesh=mesh, mp_policy=policy)
    batch = half_of(batch_for(phase), rank)
    for _ in range(2):
        moe.zero_grad()
        step(moe, loss_of(moe, batch, phase))
    state = get_model_state_dict(moe, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["mixture", "merging", *MIXTURES, "merging linear"])
def test_two_shards_train_as_one_process(tmp_path, phase, dtype):
    mp.spawn(worker, args=(str(tmp_path), phase, dtype), nprocs=2, join=True)
    sharded = torch.load(tmp_path / "state.pt")
    moe = make_model(phase)
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    if phase == "merging":
        assert torch.equal(sharded["model.umm_merge_share.share"], torch.tensor([0.9]))
    for _ in range(2):
        moe.zero_grad()
        step(moe, loss_of(moe, batch_for(phase), phase))
    for name, parameter in moe.named_parameters():
        moved = (parameter - before[name]).norm()
        assert sharded[name].dtype == torch.float32, name
        if not parameter.requires_grad:
            assert torch.equal(sharded[name], before[name]), name
            continue
        assert moved > 0, name
        # against how far two steps go: bf16 gradients keep 8 bits of each, and an expert has one sequence by sequence
        limit = 1e-3 if dtype is None else 0.25 if phase in MIXTURES else 0.15
        assert (sharded[name] - parameter).norm() <= limit * moved, name
