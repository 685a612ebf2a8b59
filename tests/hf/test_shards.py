"""Checkpoints written tensor by tensor are those that a model in memory saves: every byte of every file."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf import shards
from ummrm.hf.loading import load_checkpoint
from ummrm.hf.saving import save_written
from ummrm.merge import write_merged
from ummrm.upcycle import write_upcycled

TOKEN = {"num_experts": 3, "num_experts_per_tok": 2}
SEQUENCE = {"assignment": "sequence", "num_experts": 3}
LINEAR, ALL = {**SEQUENCE, "experts_in": "linear"}, {**SEQUENCE, "experts_in": "all"}

# family, task (None: reward model), dtype, configuration, overrides of the tiny one, fresh head
CASES = [
    ("llama", None, "float32", {**TOKEN, "router": "mlp", "router_noise": "learned"}, {}, False),
    ("llama", "ForCausalLM", "bfloat16", {**TOKEN, "expert_noise": 0.1}, {"tie_word_embeddings": True}, False),
    ("llama", "ForCausalLM", "float32", ALL, {"tie_word_embeddings": True}, True),
    ("gpt_neox", None, "float32", {**LINEAR, "expert_noise": 0.1, "layers": (1,)}, {}, False),
    ("bert", None, "bfloat16", {**ALL, "expert_noise": 0.1}, {}, False),
    ("bert", "ForMaskedLM", "float32", TOKEN, {}, True),
    ("opt", None, "float32", {**SEQUENCE, "num_shared_experts": 1}, {}, False),
    ("gpt2", "LMHeadModel", "float32", {**TOKEN, "num_shared_experts": 2}, {}, False),
    ("gpt2", None, "bfloat16", LINEAR, {}, False),
    ("phi3", None, "float16", {**TOKEN, "expert_noise": 0.1, "layers": (0,)}, {}, False),
]


def assert_same_folder(ours, wanted):
    assert sorted(os.listdir(ours)) == sorted(os.listdir(wanted))
    for path in ours.iterdir():
        other = wanted / path.name
        if path.suffix != ".safetensors":
            assert path.read_text() == other.read_text(), path.name
            continue
        got, expected = load_file(path), load_file(other)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        with safe_open(path, "pt") as file, safe_open(other, "pt") as wanted_file:
            assert file.metadata() == wanted_file.metadata()


@pytest.mark.parametrize(("family", "task", "dtype", "settings", "overrides", "new_head"), CASES)
@pytest.mark.filterwarnings("ignore:.*is a fresh head")
def test_what_is_written_is_what_a_save_writes(family, task, dtype, settings, overrides, new_head, tmp_path):
    """Upcycled, and then merged; in several files, and rounded to another dtype."""
    config, fresh = UpcycleConfig(**settings), {"new_head": True, "seed": 5} if new_head else {}
    tiny_model(family, task, getattr(torch, dtype), **overrides).save_pretrained(tmp_path / "dense")

    def seeded_dense():
        dense = load_checkpoint(tmp_path / "dense")
        torch.manual_seed(3)
        return dense

    wanted = ummrm.upcycle(seeded_dense(), config, **fresh)
    names = {id(p) for p in wanted.parameters()}
    ummrm.save_pretrained(wanted, tmp_path / "memory/model", max_shard_size="30KB")
    dense = seeded_dense()
    kept = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    ours = save_written(
        lambda folder: write_upcycled(dense, folder, config, max_shard_size="30KB", **fresh), tmp_path / "files/model"
    )
    assert_same_folder(tmp_path / "files/model", tmp_path / "memory/model")
    assert len(os.listdir(tmp_path / "files/model")) > 3, "several files and an index"
    assert type(ours) is type(wanted) and all(p.is_meta for p in ours.parameters())
    assert len({id(p) for p in ours.parameters()}) == len(names), "ties are kept"
    assert all(torch.equal(tensor, kept[name]) for name, tensor in dense.state_dict().items())

    moe = perturb_experts(load_checkpoint(tmp_path / "files/model"))
    ummrm.prepare_merge(moe)
    for rounded in (None, torch.float16):
        merged = ummrm.merge(moe, card_notes="notes")
        merged = merged if rounded is None else merged.to(rounded)
        ummrm.save_pretrained(merged, tmp_path / "memory/merged", max_shard_size="20KB")
        save_written(
            lambda folder, dtype=rounded: write_merged(
                moe, folder, dtype=dtype, max_shard_size="20KB", card_notes="notes"
            ),
            tmp_path / "files/merged",
        )
        assert_same_folder(tmp_path / "files/merged", tmp_path / "memory/merged")
        assert "notes" in (tmp_path / "files/merged/README.md").read_text()
        for name in ("memory/merged", "files/merged"):
            shutil.rmtree(tmp_path / name)


def test_one_file_has_no_index(tmp_path):
    config = UpcycleConfig(**TOKEN)
    save_written(lambda folder: write_upcycled(tiny_model("llama"), folder, config), tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    with open(tmp_path / "model/model.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert length % 8 == 0 and header["__metadata__"] == {"format": "pt"}


def test_what_is_refused_leaves_nothing(tmp_path):
    """A row that does not fit is found in the files, which are gone then; so is a merge that is not finite."""
    dense = tiny_model("llama")
    dense.config.hidden_act = "gelu"  # the layers compute silu
    with pytest.raises(ValueError, match="does not fit this LlamaForSequenceClassification"):
        save_written(lambda folder: write_upcycled(dense, folder, UpcycleConfig(**TOKEN)), tmp_path / "model")
    moe = ummrm.prepare_merge(ummrm.upcycle(tiny_model("llama"), UpcycleConfig(**TOKEN)))
    moe.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.mlp is not finite"):
        save_written(lambda folder: write_merged(moe, folder), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_model_whose_tensors_are_converted_at_a_save_is_left_to_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shards, "revert_weight_conversion", lambda model, state: {k: t.clone() for k, t in state.items()}
    )
    with pytest.raises(shards.NotStreamable, match="converts the tensors of a UmmLlama"):
        save_written(
            lambda folder: write_upcycled(tiny_model("llama"), folder, UpcycleConfig(**TOKEN)), tmp_path / "model"
        )
    assert os.listdir(tmp_path) == []


def test_a_tensor_that_nobody_writes_is_a_bug_that_is_found(tmp_path):
    model = tiny_model("llama")
    made = shards.MappedShards(tmp_path, model, "30KB")
    made.take({name: t for name, t in model.state_dict().items() if name != "model.norm.weight"})
    with pytest.raises(RuntimeError, match=r"1 tensors were never written, first 'model.norm.weight'"):
        made.check_complete()


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("bfloat16", "float32"), ("float16", "float64")])
def test_parameters_are_rounded_into_files_as_to_rounds_them(dtypes, tmp_path):
    model, same = (tiny_model("llama", "ForCausalLM", tie_word_embeddings=True) for _ in range(2))
    same.load_state_dict(model.state_dict())
    dtypes = [getattr(torch, name) for name in dtypes]
    shards.cast_on_disk(model, dtypes, tmp_path)
    for dtype in dtypes:
        same.to(dtype)
    got, wanted = dict(model.named_parameters()), dict(same.named_parameters())
    assert got.keys() == wanted.keys(), "ties are kept"
    assert all(torch.equal(got[name], p) and got[name].dtype == p.dtype for name, p in wanted.items())
    assert os.listdir(tmp_path) == []
