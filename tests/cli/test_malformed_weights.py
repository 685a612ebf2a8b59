"""Weight files that are not what they should be: one line that names the tensor or file, before weights are read."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import UpcycleConfig
from ummrm.cli.source import open_source

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(models):
    """`dense` and `moe` in several files each."""
    for name in ("dense", "moe"):
        model = AutoModelForSequenceClassification.from_pretrained(name)
        os.unlink(models / name / "model.safetensors")
        ummrm.save_pretrained(model, models / name, max_shard_size="20KB")
    return models


COMMANDS = (("upcycle", "dense", "out"), ("merge", "moe", "out"))


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("job", COMMANDS, ids=lambda job: job[0])
def test_an_index_leads_nowhere_but_to_its_own_folder(job, sharded, refused):
    folder = sharded / job[1]
    kept = (folder / INDEX).read_text()
    first = next(iter(json.loads(kept)["weight_map"].values()))
    shutil.copy(folder / first, sharded / "outside.safetensors")
    (folder / "below").mkdir()
    shutil.copy(folder / first, folder / "below/inside.safetensors")
    for place in (str(sharded / "outside.safetensors"), "../outside.safetensors", "below/inside.safetensors", "..", ""):
        edit_index(folder, lambda files, place=place: files.update({k: place for k, f in files.items() if f == first}))
        line = refused(*job)
        assert f"must name files of its own folder, got {place!r}" in line
        (folder / INDEX).write_text(kept)
    (folder / first).unlink()
    (folder / first).symlink_to("../outside.safetensors")
    assert f"got {first!r}, which leads out of it" in refused(*job)
    (folder / first).unlink()
    shutil.copy(sharded / "outside.safetensors", folder / "elsewhere")
    (folder / first).symlink_to("elsewhere")  # which stays in the folder
    assert open_source(job[1]).headers


@pytest.mark.parametrize("job", COMMANDS, ids=lambda job: job[0])
def test_files_and_tensors_that_do_not_fit_are_named(job, sharded, refused):
    folder = sharded / job[1]
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    key = "model.layers.1.self_attn.q_proj.weight"
    path = folder / files[key]
    kept = path.read_bytes()

    os.truncate(path, len(kept) - 8)
    assert f"{path.name} can't be read" in refused(*job)
    path.write_bytes(kept)

    edit_tensors(path, lambda tensors: tensors.pop(key))
    line = refused(*job)
    assert f"{path.name} must hold {key}, which {INDEX} names there, and does not" in line
    path.write_bytes(kept)

    other = next(folder / file for file in files.values() if file != path.name)
    kept_other = other.read_bytes()
    edit_tensors(other, lambda tensors: tensors.update({key: torch.zeros(24, 24)}))
    assert f"holds {key}, and so does another file" in refused(*job)
    other.write_bytes(kept_other)

    for kind in (torch.int32, torch.float8_e4m3fn):
        edit_tensors(path, lambda tensors, kind=kind: tensors.update({key: torch.ones(24, 24).to(kind)}))
        line = refused(*job)
        assert f"{key} must be of float32, bfloat16, float16 or float64, and is of {kind}".replace("torch.", "") in line
        path.write_bytes(kept)

    edit_tensors(path, lambda tensors: tensors.update({"model.layers.1.more.weight": torch.ones(3)}))
    assert "unexpected: model.layers.1.more.weight" in refused(*job)
    path.write_bytes(kept)

    edit_tensors(path, lambda tensors: tensors.pop(key))
    edit_index(folder, lambda names: names.pop(key))
    assert f"missing: {key}" in refused(*job)


def test_a_configuration_of_another_size_is_found_before_room_is_made_for_it(models, refused, monkeypatch):
    for job in COMMANDS:
        path = models / job[1] / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "intermediate_size": 10**9}))
        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
        line = refused(*job)
        assert "of another shape: model.layers.0.mlp." in line and "000000000, 24]" in line
        monkeypatch.undo()
        monkeypatch.chdir(models)


def folder_in_memory(source, dtype, out, config):
    torch.manual_seed(0)
    dense = ummrm.hf.loading.load_checkpoint(source).to(dtype)
    ummrm.save_pretrained(ummrm.upcycle(dense, config), out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "held", "named", "given"),
    [
        ("llama", torch.float32, "float32", "bfloat16"),
        ("bert", torch.float32, "bfloat16", None),  # the files' dtype is not the one that config.json names
        ("llama", torch.bfloat16, "float16", "float32"),
    ],
)
def test_weights_are_rounded_as_in_memory(family, held, named, given, models, command):
    model = tiny_model(family, dtype=held)
    model.save_pretrained("source")
    path = models / "source/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": named}))
    options = () if given is None else ("--dtype", given)
    done = command("upcycle", "source", "out", "-e", 3, "-k", 2, *options)
    assert done.status == 0, done.err
    wanted = folder_in_memory(
        "source",
        getattr(torch, given or named),
        models / "memory",
        UpcycleConfig(num_experts=3, num_experts_per_tok=2),
    )
    got = load_file("out/model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in wanted.items())
    assert json.loads((models / "out/config.json").read_text())["dtype"] == (given or named)


def test_pickled_weights_and_disks_that_can_not_be_mapped_give_the_same(models, command, monkeypatch):
    assert command("upcycle", "dense", "out", "--max-shard-size", "0.05MB").status == 0
    wanted = {path.name: path.read_bytes() for path in (models / "out").iterdir()}
    assert len(wanted) > 3

    def again(source, *said):
        shutil.rmtree(models / "out")
        done = command("upcycle", source, "out", "--max-shard-size", "0.05MB")
        assert done.status == 0 and all(text in done.err for text in said), done.err
        got = {path.name: path.read_bytes() for path in (models / "out").iterdir()}
        assert got.keys() == wanted.keys()
        assert all(got[name] == text for name, text in wanted.items() if name.endswith(".safetensors"))

    shutil.copytree("dense", "pickled")
    torch.save(load_file("dense/model.safetensors"), "pickled/pytorch_model.bin")
    os.unlink("pickled/model.safetensors")
    again("pickled")
    monkeypatch.setattr("ummrm.hf.shards.can_map", lambda folder: False)
    again("dense", "can't be mapped into memory")
    monkeypatch.undo()
    monkeypatch.chdir(models)
    monkeypatch.setattr(
        "ummrm.hf.shards.revert_weight_conversion", lambda model, state: {k: t.clone() for k, t in state.items()}
    )
    again("dense", "transformers converts the tensors of a UmmLlamaForSequenceClassification")


def test_options_of_loading_and_saving_that_make_no_sense(models, refused):
    for text in ("", "5", "GB", "-1GB", "0MB", "nanGB", "1e9999GB", "5 apples"):
        assert "`--max-shard-size` must be a number and KB" in refused("merge", "moe", "out", "--max-shard-size", text)
    assert "--revision must be left out for a folder" in refused("upcycle", "dense", "out", "--revision", "main")
    assert "`--revision` must be a branch" in refused("merge", "moe", "out", "--revision", "")
