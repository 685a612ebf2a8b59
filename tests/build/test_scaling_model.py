"""bench/scaling.py's model of a step: its bytes and parameters are those of real steps, and its table is the page's."""

import json

import pytest
import torch
from checkout import ROOT
from tiny_models import tiny_model

import ummrm
from bench import scaling
from bench.scaling import Setup, Sizes, step
from ummrm import UpcycleConfig

SIZES = Sizes("tiny", 32, 64, 2, 16, 64, experts=4, active=2, shared=1)
ROWS, LENGTH = 8, 32
SPREAD = {2: (Setup(2), Setup(2, 1, 2), Setup(2, 2, 2)), 4: (Setup(4, 1, 2), Setup(4, 1, 4), Setup(4, 2, 4))}


def test_the_page_has_the_table_of_the_model():
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert scaling.table() in page
    machine = scaling.MACHINE
    assert f"{machine.memory / 1e9:.0f} GB" in page and f"{machine.node} GPUs a node" in page
    assert f"{machine.between / 1e9:.0f} GB/s" in page and f"{machine.within / 1e9:.0f} GB/s" in page


def test_more_gpus_take_less_of_each_and_what_cannot_be_is_refused():
    one, four = (step(SIZES, Setup(n, parted=4)) for n in (4, 16))
    assert four.held < one.held and four.exchanged == one.exchanged and four.gathered > one.gathered
    with pytest.raises(ValueError, match="`parted` must divide the 4 experts, got 8"):
        step(SIZES, Setup(8, parted=8))
    with pytest.raises(ValueError, match="`gpus` must be a multiple"):
        step(SIZES, Setup(8, tensor=3))


@pytest.mark.full
@pytest.mark.parametrize("processes", SPREAD)
def test_bytes_and_parameters_are_those_of_real_steps(processes, tmp_path):
    from engine import spawn
    from engine_bytes import run

    config = UpcycleConfig(num_experts=4, num_experts_per_tok=2, router_init_std=0.5)
    overrides = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_key_value_heads": 2}
    moe = ummrm.upcycle(tiny_model("llama", **overrides), config)
    moe.save_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in moe.parameters()) == pytest.approx(SIZES.parameters, rel=1e-3)
    cases = []
    for setup in SPREAD[processes]:
        settings = {"fsdp_size": setup.data, "tp_size": setup.tensor, "ep_size": setup.parted}
        settings["ep_implementation"] = "all_to_all"
        batch = {"input_ids": torch.randint(3, 64, (ROWS, LENGTH))}
        cases.append(
            ("-".join(map(str, settings.values())), settings, batch | {"attention_mask": batch["input_ids"] > 0})
        )
    spawn(processes, run, (str(tmp_path), cases), tmp_path)
    for (name, _, _), setup in zip(cases, SPREAD[processes], strict=True):
        made = step(SIZES, Setup(setup.gpus, setup.tensor, setup.parted, ROWS, LENGTH, 4, 4, 4, 8, checkpointing=False))
        read = [json.loads((tmp_path / f"{name}.{rank}").read_text()) for rank in range(processes)]
        for key, near in (("held", 0.03), ("gathered", 0.03), ("reduced", 0.03), ("summed", 0.03), ("exchanged", 0.2)):
            mean = sum(found.get(key, 0) for found in read) / processes  # of the ranks, whose experts differ in load
            print(name, key, mean, getattr(made, key))
            assert mean == pytest.approx(getattr(made, key), rel=near), f"{name}: {key}"
