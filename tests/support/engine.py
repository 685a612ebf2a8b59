"""Tests of transformers' distributed engine: one run of N processes goes through many cases, each of which leaves its
loss, its gradients, gathered, and its routing reports in a file; one process computes what they must be."""

import os
import sys
import traceback
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import padded_batch, perturb_experts, tiny_model
from torch.distributed.tensor import DTensor

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.hf.loading import load_checkpoint
from ummrm.nn.losses import routing_reports
from ummrm.nn.merging_linear import merging_parts
from ummrm.nn.upcycled_ffn import upcycled_ffns

COEFFICIENTS = {"router_init_std": 0.5, "z_loss_coef": 0.1, "balancing_loss_coef": 0.3}
KINDS = {
    "token": UpcycleConfig(num_experts=4, num_experts_per_tok=2, **COEFFICIENTS),
    "token-8": UpcycleConfig(num_experts=8, num_experts_per_tok=3, num_shared_experts=2, **COEFFICIENTS),
    "sequence": UpcycleConfig(assignment="sequence", num_experts=4),
    "sequence-shared": UpcycleConfig(assignment="sequence", num_experts=4, num_shared_experts=1),
    "sequence-all": UpcycleConfig(assignment="sequence", num_experts=4, experts_in="all"),
    "merging": UpcycleConfig(num_experts=4, num_experts_per_tok=2, **COEFFICIENTS),
    "merging-all": UpcycleConfig(assignment="sequence", num_experts=4, experts_in="all"),
}
WITHOUT_DROPOUT = ("llama", "qwen2", "gpt_neox")  # which can be compared in training mode
ROWS = (9, 2, 7, 1, 5, 8, 3, 6)
GROUPS = (2, 0, 3, 1, 1, 3, 0, 2)


@dataclass(frozen=True)
class Case:
    """One model under one `DistributedConfig`; `lengths` are those of the global batch's rows."""

    family: str
    kind: str
    settings: dict = field(hash=False)
    lengths: tuple = ROWS
    lopsided: bool = False  # all slots go to the first experts

    def __str__(self):
        sizes = "-".join(f"{name.removesuffix('_size')}{value}" for name, value in self.settings.items())
        more = "-lopsided" * self.lopsided + "-empty" * (0 in self.lengths)
        return f"{self.family}-{self.kind}-{sizes}{more}"

    @property
    def folder(self):
        return f"{self.family}-{self.kind}" + "-lopsided" * self.lopsided

    @property
    def data_ranks(self):
        return self.settings.get("fsdp_size", 1) * self.settings.get("dp_replicate_size", 1)


def make_model(case):
    torch.manual_seed(0)
    model = perturb_experts(ummrm.upcycle(tiny_model(case.family), KINDS[case.kind]))
    if case.lopsided:
        with torch.no_grad():
            for ffn in upcycled_ffns(model).values():
                ffn.router.weight[2:] = 0  # logit 0 of the last experts, and for each token more than 0 of one of two
                ffn.router.weight[1] = -ffn.router.weight[0]
                ffn.router.weight[3] = -1e3 * ffn.router.weight[0].abs()
    if case.kind.startswith("merging"):
        ummrm.prepare_merge(model, MergeConfig(learn_shared_share=case.kind == "merging"))
        with torch.no_grad():
            for part in merging_parts(model).values():
                part.alpha.copy_(torch.randn_like(part.alpha))
    return model


def batch_of(case):
    torch.manual_seed(1)
    batch = padded_batch(lengths=case.lengths)
    if case.kind.startswith("sequence"):
        batch["groups"] = torch.tensor(GROUPS[: len(case.lengths)])
    return batch


def part_of(batch, rank, ranks):
    return {name: tensor.chunk(ranks)[rank] for name, tensor in batch.items()}


def step(model, batch, case):
    """Loss, outputs and routing reports of one step, gradients left in the model."""
    logits = model.train(case.family in WITHOUT_DROPOUT)(**batch).logits
    loss = logits.square().mean()
    reports = routing_reports(model)
    if reports:
        loss = loss + torch.stack([report.loss for report in reports.values()]).mean()
    loss.backward()
    held = {n: {k: v.detach() for k, v in vars(r).items()} for n, r in reports.items()}
    return loss.detach(), logits.detach(), held


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_case(case, folder, rank):
    model = load_checkpoint(f"{folder}/{case.folder}", distributed_config=case.settings)
    tp = case.settings.get("tp_size", 1)
    loss, logits, reports = step(model, part_of(batch_of(case), rank // tp, case.data_ranks), case)
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    local = {n: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for n, p in model.named_parameters()}
    torch.save((loss, logits, reports, gradients if rank == 0 else None, local), f"{folder}/{case}.{rank}.pt")
    dist.barrier()


def _keep_meshes():
    """One mesh for all cases of the same sizes: each makes process groups anew, and gloo's are dozens of threads."""
    from transformers.distributed import mixin

    make, made = mixin.initialize_distributed_mesh, {}

    def kept(settings):
        names = ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size", "ep_size")
        sizes = tuple(getattr(settings, name) for name in names)
        if sizes not in made:
            made[sizes] = make(settings)
        return made[sizes]

    mixin.initialize_distributed_mesh = kept


def _worker(rank, processes, function, arguments, folder):
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # never used: the processes meet at a file
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), **port)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{processes}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=15),
    )
    _keep_meshes()
    function(rank, *arguments)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of many small groups are not waited for


def spawn(processes, function, arguments, folder):
    """Runs `function(rank, *arguments)` on processes that meet in `folder`."""
    mp.spawn(_worker, args=(processes, function, arguments, str(folder)), nprocs=processes, join=True)


def run_cases(rank, cases, folder):
    for case in cases:
        try:
            run_case(case, folder, rank)
        except Exception as error:
            traceback.print_exc()
            raise AssertionError(f"{case}: {error}") from error


def save_models(cases, folder):
    for case in {case.folder: case for case in cases}.values():
        make_model(case).save_pretrained(f"{folder}/{case.folder}")
