"""Trainers on a model that transformers' engine has sharded: weights, logs and metrics are those of one process."""

import json
import re
import shutil

import pytest
import torch
from checkout import ROOT
from engine import spawn
from engine_training import make_start, run, run_page, save_starts, train
from trl_inputs import make_dataset, make_tokenizer

from ummrm.hf.loading import load_checkpoint

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.24 has it")
pytestmark = pytest.mark.full


def consolidate(parts, folder):
    """Makes an ordinary folder of what each rank has written."""
    from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

    consolidate_distributed_checkpoint(parts, folder)
    shutil.copy(parts / "config.json", folder)


SETTINGS = {
    2: ({"fsdp_size": 2}, {"tp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}),
    4: ({"fsdp_size": 4}, {"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
}


def name_of(kind, family, sizes):
    return "-".join([kind, family, *(f"{key}{value}" for key, value in sizes.items())])


def cases(processes):
    found = []
    for sizes in SETTINGS[processes]:
        for kind in ("token", "sequence", "to merge", "merging", "distil"):
            if ("merg" in kind or kind == "distil") and "ep_size" in sizes:
                continue
            for family in ("llama",) if processes == 4 or kind == "distil" else ("llama", "gpt_neox"):
                found.append((name_of(kind, family, sizes), kind, family, sizes))
    kind, family, sizes = "token", "llama", SETTINGS[processes][-1]
    found.append((name_of(kind, family, sizes) + "-saved", kind, family, sizes))
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"engine-training-{request.param}")
    save_starts({case[1:3] for case in cases(request.param)}, folder)
    spawn(request.param, run, (cases(request.param), str(folder)), folder)
    return request.param, folder


def test_training_equals_one_process(ran, tmp_path):
    processes, folder = ran
    whole = {}
    for name, kind, family, _sizes in cases(processes):
        if (kind, family) not in whole:
            model = make_start(kind, family)
            start = {n: p.detach().clone() for n, p in model.named_parameters()}
            teacher = folder / "teacher" if kind == "distil" else None
            whole[kind, family] = (start, *train(model, kind, tmp_path / f"{kind}-{family}", teacher=teacher))
        start, ours, alone = whole[kind, family]
        parameters = torch.load(folder / f"{name}.0.pt")[0]
        assert parameters.keys() == ours.keys()
        for key, parameter in ours.items():
            moved = (parameter - start.get(key, torch.zeros_like(parameter))).abs().max()  # alpha starts at 0
            difference = (parameters[key] - parameter).abs().max()
            assert difference <= 1e-4 * moved + 2e-7, f"{name}: {key} differs by {difference}, moved by {moved}"
        logs = [torch.load(folder / f"{name}.{rank}.pt", weights_only=False)[1] for rank in range(processes)]
        assert logs[0].keys() == alone.keys(), name
        for key, value in alone.items():
            if key.endswith(("runtime", "per_second")) or key.startswith("load_balancing_loss"):
                continue
            for log in logs:
                assert log[key] == pytest.approx(value, rel=2e-4, abs=1e-6), f"{name}: {key}"


def test_a_checkpoint_of_weights_is_one_that_any_number_of_processes_reads(ran):
    processes, folder = ran
    name = next(case[0] for case in cases(processes) if case[0].endswith("saved"))
    parameters = torch.load(folder / f"{name}.0.pt")[0]
    for saved in ("checkpoint-1", "whole"):  # the latter tensor by tensor, with no process that holds more
        for key, parameter in load_checkpoint(folder / f"out-{name}" / saved).named_parameters():
            assert torch.equal(parameter, parameters[key]), key


def test_the_pages_script_runs_on_two_processes(tmp_path):
    """In bf16, with fp32 weights: run_page does exec(compile(code, "docs/scaling.md", "exec"))."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/scaling.md").read_text(), re.M | re.S)
    moe = make_start("token")
    moe.save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_dataset(16)))
    spawn(2, run_page, (str(tmp_path), code), tmp_path)
    consolidate(tmp_path / "moe-parts", tmp_path / "whole")
    trained = load_checkpoint(tmp_path / "whole")
    for name, parameter in moe.named_parameters():
        assert trained.get_parameter(name).dtype == torch.float32 and trained.get_parameter(name).isfinite().all()
        assert not torch.equal(trained.get_parameter(name), parameter), name
