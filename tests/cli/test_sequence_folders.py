"""The commands on folders of mixtures assigned by sequence: what `info` says, what `merge` writes and refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import outputs_of, padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import UpcycleConfig


def test_info_counts_the_experts_of_linear_layers(models, command):
    done = command("info", "sequence", "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    expected = {"kind": "mixture", "assignment": "sequence", "experts_in": "linear", "upcycled_layers": 1}
    expected |= {"num_experts": 3, "num_experts_per_tok": 1, "num_shared_experts": 0}
    assert {key: record[key] for key in expected} == expected and "gate" not in record
    tensors = load_file("sequence/model.safetensors")
    dense = sum(t.numel() for t in load_file("dense/model.safetensors").values())
    assert record["parameters"] == sum(t.numel() for t in tensors.values())
    assert record["parameters_per_token"] == dense, "a token goes through one member"
    said = command("info", "sequence").out
    assert "linear" in said and f"{dense:,}" in said and "gate" not in said


def test_a_mixture_merges_uniformly_and_one_in_its_merge_phase_with_its_weights(models, command, refused):
    assert "shared_share` must be 0 for a mixture" in refused("merge", "sequence", "out", "--shared-share", 0.5)
    done = command("merge", "sequence", "merged")
    assert done.status == 0 and "uniform merge weights" in done.out, done.err
    moe = AutoModelForSequenceClassification.from_pretrained("sequence")
    batch = padded_batch()
    merged = AutoModelForSequenceClassification.from_pretrained("merged")
    torch.testing.assert_close(outputs_of(merged, batch), outputs_of(ummrm.merge(moe), batch))
    assert "folded back with equal weights" in (models / "merged/README.md").read_text()

    ummrm.prepare_merge(moe)
    with torch.no_grad():
        moe.model.layers[1].self_attn.v_proj.alpha.copy_(torch.tensor([2.0, 0.0, -1.0]))
    moe.save_pretrained("merging-by-sequence")
    assert "merge phase" in command("info", "merging-by-sequence").out
    done = command("merge", "merging-by-sequence", "learned", "--dtype", "bfloat16")
    assert done.status == 0 and "learned merge weights" in done.out, done.err
    learned = AutoModelForSequenceClassification.from_pretrained("learned")
    weight = ummrm.merge(moe).model.layers[1].self_attn.v_proj.weight
    assert torch.equal(learned.model.layers[1].self_attn.v_proj.weight, weight.bfloat16())


def test_a_folder_with_shared_experts_brings_their_weight(models, command):
    config = UpcycleConfig(assignment="sequence", num_experts=2, num_shared_experts=1, fixed_shared_weight=0.25)
    done = command("upcycle", "dense", "out", "--assignment", "sequence", "-e", 2, "--num-shared-experts", 1)
    assert done.status == 0, done.err
    done = command(
        *("upcycle", "dense", "out", "--overwrite", "--assignment", "sequence", "-e", 2),
        *("--num-shared-experts", 1, "--fixed-shared-weight", 0.25),
    )
    assert done.status == 0, done.err
    moe = AutoModelForSequenceClassification.from_pretrained("out")
    assert moe.config.upcycle_config == config
    assert command("merge", "out", "merged").status == 0
    assert "| shared_share | 0.25 |" in (models / "merged/README.md").read_text()
    assert command("merge", "out", "half", "--shared-share", 0.5).status == 0
    assert "| shared_share | 0.5 |" in (models / "half/README.md").read_text()


def test_every_expert_gets_a_fresh_head_of_its_own(models, command, refused):
    tiny_model("llama", "ForCausalLM").save_pretrained("base")
    options = ("--assignment", "sequence", "--experts-in", "all", "-e", 3)
    assert 'without a reward head, got "all"' in refused("upcycle", "base", "out", *options, "--no-new-head")
    done = command("upcycle", "base", "out", *options, "--new-head", "--seed", 4)
    assert done.status == 0 and "is a fresh head (seed 4" in done.err, done.err
    moe = AutoModelForSequenceClassification.from_pretrained("out")
    with pytest.warns(UserWarning, match="fresh head"):
        first = ummrm.reward_model("base", seed=4).score.weight
    assert torch.equal(moe.score.expert_weight[0], first) and moe.score.expert_weight.std(0).min() > 0
    record = json.loads(command("info", "out", "--json").out)
    assert record["experts_in"] == "all" and record["parameters_per_token"] * 3 > record["parameters"]
    assert command("merge", "out", "merged").status == 0
    merged = AutoModelForSequenceClassification.from_pretrained("merged")
    torch.testing.assert_close(merged.score.weight, moe.score.expert_weight.mean(0))
    assert "the linear layers and the reward head of `base`" in (models / "merged/README.md").read_text()
    assert command("upcycle", "dense", "copies", *options).status == 0
    copies = AutoModelForSequenceClassification.from_pretrained("copies").score.expert_weight
    assert torch.equal(copies[2], copies[0])


def test_what_belongs_to_the_other_assignment_is_refused(models, refused):
    line = refused("upcycle", "dense", "out", "--assignment", "sequence", "--gate", "fixed")
    assert "gate" in line and "token" in line
    line = refused("upcycle", "dense", "out", "--experts-in", "linear")
    assert "experts_in" in line and "sequence" in line
    config = json.loads((models / "sequence/config.json").read_text())
    for changes, message in (
        ({"experts_in": "attention"}, "experts_in"),
        ({"num_shared_experts": 1}, "num_shared_experts"),
        ({"evaluation": 3}, "evaluation"),
        ({"assignment": "expert"}, "assignment"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok"),
        ({"experts_in": "ffn"}, "unexpected: model.layers.1.self_attn"),
        ({"num_experts": 2}, "of another shape"),
    ):
        (models / "sequence/config.json").write_text(json.dumps({**config, "umm": {**config["umm"], **changes}}))
        assert message in refused("merge", "sequence", "out"), changes
