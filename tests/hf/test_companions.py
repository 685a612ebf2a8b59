"""What a checkpoint has beside weights and configuration comes along when a model is saved elsewhere."""

import os
import stat

import huggingface_hub.constants
import pytest
from tiny_models import tiny_model

import ummrm
from ummrm.hf.saving import copy_companions

COMPANIONS = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "spm.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tokenizer.model", "preprocessor_config.json", "processor_config.json", "LICENSE", "generation_config.json"),
    *("additional_chat_templates/tools.jinja", "README.md"),
}
OTHERS = {
    *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "tf_model.h5"),
    *("adapter_config.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"),
    *("eval_results.json", ".gitattributes", "checkpoint-5/tokenizer.json", "onnx/model.onnx", "runs/events.txt"),
    "distillation.json",
}


def fill(folder):
    for name in COMPANIONS | OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"source {name}")
    return folder


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_everything_that_is_neither_weights_nor_configuration_comes_along(tmp_path):
    source, target = fill(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (target / "tokenizer.json").write_text("of a model that lay here before")
    assert set(copy_companions(source, target)) == COMPANIONS
    assert files_of(target) == {name: f"source {name}" for name in COMPANIONS}
    assert copy_companions(source, source) == [] and files_of(source).keys() == COMPANIONS | OTHERS


def test_what_the_save_wrote_is_kept_and_what_is_no_file_is_left_out(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("README.md", "generation_config.json", "blob"):
        (source / name).write_text(f"source {name}")
    os.mkfifo(source / "pipe")
    (source / "nothing").symlink_to("gone")
    (source / "vocab.txt").symlink_to("blob")
    os.chmod(source / "blob", 0o600)
    ummrm.save_pretrained(tiny_model("llama", "ForCausalLM"), target, model_card="ours")
    config = (target / "config.json").read_text()
    with pytest.warns(UserWarning) as caught:
        assert copy_companions(source, target) == ["blob", "vocab.txt"]
    said = sorted(str(w.message) for w in caught)
    assert "nothing is a link to nothing, and is not copied" in said[0] and "a named pipe (FIFO), and is not" in said[1]
    assert (target / "README.md").read_text() == "ours" and (target / "config.json").read_text() == config
    assert "source" not in (target / "generation_config.json").read_text()
    assert (target / "vocab.txt").read_text() == "source blob" and not (target / "vocab.txt").is_symlink()
    mode = stat.S_IMODE((target / "config.json").stat().st_mode)
    assert stat.S_IMODE((target / "vocab.txt").stat().st_mode) == mode
    assert set(os.listdir(target)) == {
        *("config.json", "model.safetensors", "generation_config.json", "README.md", "blob", "vocab.txt")
    }


def test_a_hub_name_brings_its_files_from_the_cache(tmp_path, monkeypatch):
    """The layout of the hub's cache: a reference, a snapshot of links, and the files that they lead to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--dense-rm"
    commit = "0123456789abcdef0123456789abcdef01234567"
    blobs = fill(repository / "blobs")
    for name in COMPANIONS | OTHERS:
        link = repository / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / name, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    target = tmp_path / "target"
    assert set(copy_companions("someone/dense-rm", target)) == COMPANIONS
    assert files_of(target) == {name: f"source {name}" for name in COMPANIONS}
    assert not any(path.is_symlink() for path in target.rglob("*"))
    with pytest.raises(OSError, match="someone/other|offline|Cannot find"):
        copy_companions("someone/other", target)
