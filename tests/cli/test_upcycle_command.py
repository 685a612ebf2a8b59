"""`ummrm upcycle`: the room that it needs, known beforehand, and the head that a seed gives."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ummrm
from ummrm import UpcycleConfig
from ummrm.cli.source import open_source
from ummrm.cli.upcycle import _upcycled_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("experts_in", ["ffn", "linear", "all", None])
def test_the_room_that_an_upcycled_model_needs_is_known_before_it_is_loaded(family, experts_in, tmp_path):
    torch.manual_seed(0)
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path / "dense")
    config = UpcycleConfig(assignment="sequence", experts_in=experts_in, layers=(1,)) if experts_in else UpcycleConfig()
    expected = _upcycled_bytes(open_source(str(tmp_path / "dense")), config, "bfloat16")
    head = sum(p.numel() for name, p in dense.named_parameters() if name.startswith(("score.", "classifier.")))
    moe = ummrm.upcycle(dense, config)
    routers = sum(p.numel() for name, p in moe.named_parameters() if ".router." in name)
    actual = 2 * (sum(p.numel() for p in moe.parameters()) - routers)
    assert actual == expected + (2 * 3 * head if experts_in == "all" else 0)  # the head's experts are left out


@pytest.mark.parametrize("experts_in", ["ffn", "all"])
def test_a_seed_gives_the_head_that_it_gives_in_python(models, command, experts_in):
    tiny_model("llama", "ForCausalLM").save_pretrained("base")
    options = ("--assignment", "sequence", "--experts-in", experts_in, "--new-head", "--seed", 3)
    assert command("upcycle", "base", "out", *options).status == 0
    config = UpcycleConfig(assignment="sequence", experts_in=experts_in)
    backbone = AutoModelForCausalLM.from_pretrained("base")
    with pytest.warns(UserWarning, match="fresh head"):
        wanted = ummrm.upcycle(backbone, config, new_head=True, seed=3).state_dict()
    got = AutoModelForSequenceClassification.from_pretrained("out").state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
