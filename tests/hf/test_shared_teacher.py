"""A teacher given by its path: two processes share its weights, score as one does, and none holds all of them."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from streaming_child import watched
from tiny_models import perturb_experts, tiny_model
from torch.distributed.tensor import DTensor
from two_processes import meet

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.ensembles import Member
from ummrm.hf.sharding import is_sharded, shared

pytestmark = pytest.mark.full

LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
TEXTS = [[5 + i % 7, 6, 7 + i % 3, *[8] * (i % 4)] for i in range(11)]
MODELS = {
    "sequence": UpcycleConfig(assignment="sequence", num_experts=4, experts_in="all"),
    "token": UpcycleConfig(num_experts=3, num_experts_per_tok=2, router_init_std=0.5),
    "dense": None,
}


def make(kind, **sizes):
    torch.manual_seed(0)
    model = tiny_model("llama", **sizes)
    return model if MODELS[kind] is None else perturb_experts(ummrm.upcycle(model, MODELS[kind]))


def score(path, rank, held=None):
    """This process's part of the scores; what it holds of the model while it does, in `held`."""
    member = Member(path, tokenizer=False)
    with member.loaded() as model, shared(model, torch.device("cpu")):
        assert is_sharded(model) and all(isinstance(p, DTensor) for p in model.parameters())
        if held is not None:
            held.append(sum(p.to_local().nbytes for p in model.parameters()))
        scores = member.scores(TEXTS, 2, share=(rank, 2))
    assert member.model is None
    return scores


def worker(rank, folder):
    meet(rank, folder)
    found = {kind: score(f"{folder}/{kind}", rank) for kind in MODELS}
    torch.save(found, f"{folder}/scores.{rank}")
    held = []
    _, most = watched(score, f"{folder}/large", rank, held)
    with open(f"{folder}/memory.{rank}", "w") as file:
        json.dump([most, *held], file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_teacher_and_neither_holds_the_whole_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # else glibc keeps what was freed, and it looks as if held
    for kind in MODELS:
        make(kind).save_pretrained(tmp_path / kind)
    make("sequence", **LARGE).save_pretrained(tmp_path / "large")
    whole = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert whole > 80e6
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2, join=True)
    found = [torch.load(tmp_path / f"scores.{rank}") for rank in range(2)]
    for kind in MODELS:
        expected = Member(make(kind)).scores(TEXTS, 2)
        assert torch.equal(sum(part[kind] for part in found), expected) and expected.std(0).min() > 0, kind
    for rank in range(2):
        most, held = json.loads((tmp_path / f"memory.{rank}").read_text())
        assert held == pytest.approx(whole / 2, rel=0.01)
        # its half, and of the layers that run and come next three parts: gathered, put together, and the next one's
        assert most < whole / 2 + 3.5 * whole / LARGE["num_hidden_layers"], f"rank {rank} took {most} of {whole}"
