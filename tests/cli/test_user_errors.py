"""The commonest mistakes of a user: one line each, what is wrong and how to mend it; exit 2, nothing changed."""

import json
import os
import resource
import shutil
import socket
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ummrm.cli import main


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damaged(folder, how):
    """Makes one of the usual accidents happen to a model folder."""
    weights = folder / "model.safetensors"
    if how == "weights cut short":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "header cut short":
        os.truncate(weights, 20)
    elif how == "weights empty":
        os.truncate(weights, 0)
    elif how == "pickled weights cut short":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
        os.truncate(folder / "pytorch_model.bin", 3000)
    elif how == "weights of another shape":
        tensors = load_file(weights)
        name = next(n for n in tensors if n.endswith("up_proj.weight"))
        tensors[name] = torch.cat([tensors[name], tensors[name]])
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no weights":
        weights.unlink()
    elif how == "a shard is missing":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        names = load_file(folder / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "config.json broken":
        (folder / "config.json").write_text('{"architectures": [')
    elif how == "config.json a list":
        (folder / "config.json").write_text("[]")
    elif how == "no config.json":
        (folder / "config.json").unlink()
    elif how == "config.json a FIFO":
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
    elif how == "class unknown":
        edit_config(folder, architectures=["LlamaForRewardingThings"])
    elif how == "class no model":
        edit_config(folder, architectures=["Trainer"])
    elif how == "class with an escape":
        edit_config(folder, architectures=["\x1b[2J\nLlama"])
    elif how == "class missing":
        edit_config(folder, architectures=None)
    elif how == "model_type unknown":
        edit_config(folder, model_type="lama", architectures=["LamaForSequenceClassification"])
    elif how == "value of the wrong kind":
        edit_config(folder, hidden_size="wide")
    elif how == "value impossible":
        edit_config(folder, num_attention_heads=0)
    elif how == "far too many layers":
        edit_config(folder, num_hidden_layers=10**9)
    elif how == "code of its own":
        edit_config(folder, auto_map={"AutoConfig": "configuration_x.X"}, model_type="x")
    elif how == "an adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif how == "quantised":
        edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights cut short", "model.safetensors can't be read"),
        ("header cut short", "model.safetensors can't be read"),
        ("weights empty", "model.safetensors can't be read"),
        ("pickled weights cut short", "dense can't be loaded"),
        ("weights of another shape", "up_proj"),
        ("no weights", "holds no weights"),
        ("a shard is missing", "model-00002-of-00002.safetensors"),
        ("config.json broken", "config.json can't be read: line 1, column 20"),
        ("config.json a list", "config.json must hold a mapping, got a list"),
        ("no config.json", "has no config.json"),
        ("config.json a FIFO", "config.json must be a file"),
        ("class unknown", "LlamaForRewardingThings"),
        ("class no model", "Trainer"),
        ("class with an escape", "\\x1b[2J Llama"),
        ("class missing", "`architectures`"),
        ("model_type unknown", "LamaForSequenceClassification"),
        ("value of the wrong kind", "hidden_size"),
        ("value impossible", "dense can't be loaded"),
        ("far too many layers", "num_hidden_layers"),
        ("code of its own", "code of its own"),
        ("an adapter", "merge_and_unload"),
        ("quantised", "quantisation"),
    ],
)
def test_a_damaged_model_folder(how, message, models, refused):
    damaged(models / "dense", how)
    line = refused("upcycle", "dense", "out")
    assert message in line and len(line) < 800, line


def test_a_record_of_an_interrupted_save_that_nobody_can_read(models, refused):
    for name in ("dense", "moe", "out"):
        (models / name / ".ummrm-save").mkdir(parents=True)
    for arguments in (("info", "moe"), ("merge", "moe", "new"), ("upcycle", "dense", "new")):
        assert "no record of a save that ummrm can read" in refused(*arguments)
    line = refused("merge", "merging", "out")
    assert "out can't be written" in line and "no record of a save that ummrm can read" in line


def test_folders_that_are_not_there(models, refused):
    assert "did you mean 'dense'?" in refused("upcycle", "dnese", "out")
    assert "no folder" in refused("upcycle", models / "none", "out")
    assert "is a file" in refused("upcycle", "dense/config.json", "out")
    assert "no folder" in refused("info", "dnese")
    assert "no folder" in refused("merge", "x" * 5000, "out")
    assert "no folder" in refused("merge", "", "out")
    assert "no folder" in refused("merge", os.fsdecode(b"no-text-\xff"), "out")


@pytest.mark.parametrize("endpoint", ["closed", "silent", "no answer", "offline"])
def test_a_hub_name_without_network_is_answered_within_five_seconds(endpoint, models, refused, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if endpoint == "silent":
            listener.listen()  # takes the connection, and never says a word
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "cache"))
        if endpoint == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        if endpoint == "no answer":  # a name server that keeps its caller waiting, which no timeout of a request covers
            monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(60))
        start = time.monotonic()
        line = refused("upcycle", "some-organisation/some-reward-model", "out")
        assert time.monotonic() - start < 5
    assert "no folder" in line and "hub" in line


def test_in_place_is_refused_before_anything_is_written(models, refused):
    (models / "link").symlink_to("dense")
    for out in ("dense", "./dense/", models / "dense", "link", "dense/below", "link/below/deeper", "dense/../dense"):
        for flags in ((), ("--overwrite",)):
            assert "the folder that is read" in refused("upcycle", "dense", out, *flags)
    assert "the folder that is read" in refused("merge", "moe", "moe", "--overwrite")


def test_a_device_that_is_not_there(models, refused):
    assert "`--device`" in refused("upcycle", "dense", "out", "--device", "gpu")
    assert "`--device`" in refused("merge", "moe", "out", "--device", "meta")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused("upcycle", "dense", "out", "--device", "cuda")
        assert "no CUDA device" in refused("merge", "moe", "out", "--device", "cuda:7")


def test_models_of_the_other_kind(models, refused):
    assert "is upcycled already" in refused("upcycle", "moe", "out")
    assert "is no upcycled model" in refused("merge", "dense", "out")
    assert "has its own lambda" in refused("merge", "merging", "out", "--shared-share", 0.5)
    assert "shared_share" in refused("merge", "moe", "out", "--shared-share", 1.5)


def test_what_a_newer_ummrm_wrote(models, refused):
    umm = json.loads((models / "moe/config.json").read_text())["umm"]
    edit_config(models / "moe", umm={**umm, "gate_temperature": 2.0})
    assert "gate_temperature" in refused("merge", "moe", "out")
    edit_config(models / "merging", model_type="umm_llama9", architectures=["UmmLlama9ForSequenceClassification"])
    line = refused("merge", "merging", "out")
    assert "umm_llama9" in line and "upgrade" in line


def test_a_full_disk(models, refused, monkeypatch):
    usage = shutil.disk_usage(models)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000))
    for arguments in (("upcycle", "dense", "new/out"), ("merge", "moe", "out")):
        assert "free" in refused(*arguments)


def test_a_write_that_fails(models, refused):
    """No file of this process may pass 8 kB: what a full disk does, at a time that nothing foresees."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        line = refused("upcycle", "dense", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out can't be written" in line


def test_a_bug_still_shows_where(models, monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug of ours")

    monkeypatch.setattr(sys.modules["ummrm.upcycle"], "write_upcycled", broken)
    monkeypatch.setattr(sys, "argv", ["ummrm", "upcycle", "dense", "out"])
    with pytest.raises(TypeError, match="a bug of ours"):
        main()
