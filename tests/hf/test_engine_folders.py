"""From a dense folder to a sharded mixture and back to files: no rank ever holds the whole of it."""

import json
import shutil

import pytest
import torch
from engine import Case, full, make_model, save_models, spawn
from streaming_child import watched
from tiny_models import tiny_model

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.loading import load_checkpoint
from ummrm.hf.saving import save_shared, save_written
from ummrm.merge import save_merged, write_merged
from ummrm.upcycle import write_upcycled

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.24 has it")
pytestmark = pytest.mark.full


def consolidate(parts, folder):
    """Makes an ordinary folder of what each rank has written."""
    from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

    consolidate_distributed_checkpoint(parts, folder)
    shutil.copy(parts / "config.json", folder)


CONFIG = UpcycleConfig(num_experts=8, num_experts_per_tok=2, expert_noise=0.1)
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}


def load(rank, folder, sizes, out):
    """How much anonymous memory a rank takes at most while it loads, and how much of the model it then holds."""
    load_checkpoint(f"{folder}/small", distributed_config=sizes)  # what the first load takes
    model, most = watched(load_checkpoint, f"{folder}/moe", distributed_config=sizes)
    held = sum(p.to_local().nbytes for p in model.parameters())
    with open(f"{folder}/{out}.{rank}", "w") as file:
        json.dump([most, held], file)


@pytest.mark.parametrize(
    ("processes", "sizes"),
    [(2, {"fsdp_size": 2}), (4, {"fsdp_size": 4, "ep_size": 4}), (4, {"fsdp_size": 4, "ep_size": 2})],
)
def test_a_rank_takes_its_share_of_a_streamed_mixture_alone(processes, sizes, tmp_path):
    dense = tiny_model("llama", **LARGE)
    dense.save_pretrained(tmp_path / "dense")
    for name, source in (("moe", load_checkpoint(tmp_path / "dense")), ("small", tiny_model("llama"))):
        made = save_written(lambda folder, source=source: write_upcycled(source, folder, CONFIG), tmp_path / name)
    del made
    whole = sum(file.stat().st_size for file in (tmp_path / "moe").glob("*.safetensors"))
    assert whole > 80e6
    spawn(processes, load, (str(tmp_path), sizes, "memory"), tmp_path)
    for rank in range(processes):
        most, held = json.loads((tmp_path / f"memory.{rank}").read_text())
        assert held == pytest.approx(whole / processes, rel=0.01)
        # one tensor of a layer's experts is read beside it, cut to the rank's part
        assert most < whole / processes * 1.3 + 8e6, f"rank {rank} took {most} of {whole}"


def save_parts(rank, folder, sizes, back):
    model = load_checkpoint(f"{folder}/small", distributed_config=sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(f"{folder}/parts", distributed_checkpoint=True)
    again = load_checkpoint(f"{folder}/parts", distributed_config=back)
    state = {
        name: (full(p), full(q)) for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True)
    }
    assert all(torch.equal(p, q) for p, q in state.values())


def test_weights_are_saved_by_all_ranks_read_by_others_and_merged_as_files(tmp_path):
    """Each rank writes its own part. One process makes a folder of them, which the commands stream."""
    config = UpcycleConfig(assignment="sequence", num_experts=4, expert_noise=0.1)
    moe = ummrm.upcycle(tiny_model("llama"), config)
    moe.save_pretrained(tmp_path / "small")
    sizes = {"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}
    spawn(4, save_parts, (str(tmp_path), *sizes), tmp_path)
    assert len(list((tmp_path / "parts").glob("shard-*.safetensors"))) >= 4
    consolidate(tmp_path / "parts", tmp_path / "whole")
    read = load_checkpoint(tmp_path / "whole")
    for name, parameter in moe.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter * 1.5), name
    merged = save_written(lambda folder: write_merged(read, folder), tmp_path / "merged")
    assert merged.device.type == "meta"
    for name, parameter in ummrm.merge(read).named_parameters():
        assert torch.equal(load_checkpoint(tmp_path / "merged").get_parameter(name), parameter), name


MERGED = {
    2: ({"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2}),
    4: ({"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
}


def merge_cases(processes):
    kinds = ("merging", "sequence", "sequence-all")
    every = [Case("llama", kind, sizes) for kind in kinds for sizes in MERGED[processes]]
    parted = [case for case in every if not ("ep_size" in case.settings and case.kind == "merging")]
    return [case for case in parted if not ("tp_size" in case.settings and case.kind == "sequence-all")]


def merge_them(rank, folder, cases):
    for case in cases:
        model = load_checkpoint(f"{folder}/{case.folder}", distributed_config=case.settings)
        merged = ummrm.merge(model)
        if rank == 0:
            torch.save(merged.state_dict(), f"{folder}/{case}.pt")
        save_merged(model, f"{folder}/{case}-merged")
        save_shared(model, f"{folder}/{case}-shared")


@pytest.mark.parametrize("processes", MERGED)
def test_sharded_models_merge_and_save_bit_for_bit_as_whole_ones(processes, tmp_path):
    cases = merge_cases(processes)
    save_models(cases, tmp_path)
    spawn(processes, merge_them, (str(tmp_path), cases), tmp_path)
    for case in cases:
        whole = make_model(case)
        want, got = ummrm.merge(whole).state_dict(), torch.load(tmp_path / f"{case}.pt")
        saved = load_checkpoint(tmp_path / f"{case}-merged").state_dict()
        shared = load_checkpoint(tmp_path / f"{case}-shared").state_dict()
        assert want.keys() == got.keys() == saved.keys() and shared.keys() == whole.state_dict().keys()
        for key, tensor in want.items():
            assert torch.equal(got[key], tensor) and torch.equal(saved[key], tensor), f"{case}: {key}"
        assert all(torch.equal(shared[key], tensor) for key, tensor in whole.state_dict().items()), case
