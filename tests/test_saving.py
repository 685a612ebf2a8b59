"""A model folder is whole or not there: kill a save at any moment and the previous folder still loads."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import outputs_of, padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import UpcycleConfig, saving

CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2)
TESTS = Path(__file__).parent

# Runs in a child: saves over an existing folder and dies by SIGKILL at the n-th call of a watched system operation.
KILLED_SAVE = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch, ummrm
    from tiny_models import tiny_model
    from ummrm import saving
    torch.manual_seed(1)
    model = ummrm.upcycle(tiny_model("llama"), ummrm.UpcycleConfig(num_experts=3, num_experts_per_tok=2))
    if {merged}:
        model = ummrm.merge(ummrm.prepare_merge(model))
    if not {exchange}:
        saving._exchange = lambda a, b: False
    calls = 0
    def watch(owner, name):
        original = getattr(owner, name)
        def watched(*args, **kwargs):
            global calls
            calls += 1
            if calls == {at}:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, watched)
    import transformers.modeling_utils as mu, transformers.configuration_utils as cu
    for owner, name in ((os, "rename"), (os, "fsync"), (os, "link"), (os, "makedirs"), (mu, "safe_save_file"),
                        (saving, "_put_in_place"), (saving, "_exchange"), (saving, "_flush_tree"), (saving, "_carry_over"),
                        (saving.shutil, "rmtree"), (cu.PreTrainedConfig, "to_json_file")):
        watch(owner, name)
    model.save_pretrained({folder!r}, max_shard_size="20KB")
    print("calls", calls)
"""


def run_killed_save(folder, at, merged=False, exchange=True):
    script = textwrap.dedent(KILLED_SAVE).format(
        tests=str(TESTS), merged=merged, exchange=exchange, at=at, folder=str(folder)
    )
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)


def saved_model(folder, merged=False):
    torch.manual_seed(0)
    model = ummrm.upcycle(tiny_model("llama"), CONFIG)
    if merged:
        model = ummrm.merge(ummrm.prepare_merge(model))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def loads_as(folder, model):
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    ours = model.state_dict()
    return all(torch.equal(v, ours[k]) for k, v in loaded.state_dict().items())


def loadable_folders(parent):
    """Every folder below `parent` that transformers would load."""
    found = []
    for config in parent.rglob("config.json"):
        try:
            AutoModelForSequenceClassification.from_pretrained(config.parent)
        except Exception:  # noqa: BLE001  whatever a half-written folder raises
            continue
        found.append(config.parent)
    return found


@pytest.mark.parametrize("merged", [False, True], ids=["moe", "merged"])
def test_kill_9_at_every_step_of_a_save(merged, tmp_path):
    whole = run_killed_save(tmp_path / "count", at=0, merged=merged)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "model"
    old = saved_model(folder, merged)
    new_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "count")
    total = int(run_killed_save(tmp_path / "count", at=0, merged=merged).stdout.split()[-1])
    assert total > 12
    outcomes = []
    for at in sorted({1, 2, 3, total // 2, *range(total - 5, total + 1)}):
        died = run_killed_save(folder, at=at, merged=merged)
        assert died.returncode == -signal.SIGKILL, died.stderr
        is_old, is_new = loads_as(folder, old), loads_as(folder, new_model)
        assert is_old != is_new, at
        assert (folder / "tokenizer.json").read_text() == "{}"
        outcomes.append(is_new)
        if is_new:
            break
    assert not outcomes[0], "the first kill comes before anything is in place"
    final = run_killed_save(folder, at=0, merged=merged)
    assert final.returncode == 0 and loads_as(folder, new_model)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], (
        "leftovers are cleared by the next save"
    )


def test_kill_9_where_the_file_system_cannot_exchange(tmp_path):
    """Moved aside first: a kill between the two renames is mended by the next save, and nothing half-written loads."""
    folder = tmp_path / "model"
    old = saved_model(folder)
    total = int(run_killed_save(tmp_path / "count", at=0, exchange=False).stdout.split()[-1])
    total_over = total + 6  # over an existing folder there are more steps; kill at the last of them
    seen_missing = False
    for at in range(total - 6, total_over):
        if run_killed_save(folder, at=at, exchange=False).returncode == 0:
            break
        if not folder.exists():
            seen_missing = True
            aside = [p for p in tmp_path.rglob("model.old") if p.is_dir()]
            assert len(aside) == 1 and loads_as(aside[0], old)
            saving._clear_leftovers(folder)
            assert loads_as(folder, old)
    assert seen_missing, "no kill fell between the two renames"


def test_a_killed_first_save_leaves_nothing_that_loads(tmp_path):
    for at in (1, 2, 3, 4, 5):
        assert run_killed_save(tmp_path / "model", at=at).returncode == -signal.SIGKILL
        assert not (tmp_path / "model").exists()
        assert loadable_folders(tmp_path) == []


def test_a_failed_save_keeps_the_old_folder_and_cleans_up(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    old = saved_model(folder)
    listing = sorted(os.listdir(tmp_path))

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        ummrm.upcycle(tiny_model("llama"), CONFIG).save_pretrained(folder)
    assert sorted(os.listdir(tmp_path)) == listing and loads_as(folder, old)


@pytest.mark.parametrize("exchange", [True, False])
def test_files_of_others_are_carried_over_and_stale_weights_are_not(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(saving, "_exchange", lambda a, b: False)
    folder = tmp_path / "model"
    model = ummrm.upcycle(tiny_model("llama"), CONFIG)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "logs").mkdir()
    (folder / "logs" / "run.txt").write_text("log")
    (folder / "link").symlink_to("tokenizer.json")
    os.chmod(folder, 0o750)
    model.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "link", "logs", "model.safetensors", "tokenizer.json"]
    assert (folder / "link").read_text() == "tokens" and (folder / "logs" / "run.txt").read_text() == "log"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["model"]
    batch = padded_batch()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(outputs_of(loaded, batch), outputs_of(model, batch), rtol=1e-5, atol=1e-6)


def test_saving_through_a_link_replaces_what_it_leads_to(tmp_path):
    model = saved_model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and loads_as(tmp_path / "real", model)


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(NotADirectoryError, match="must be a folder, got the file .*model; choose another path"):
        ummrm.upcycle(tiny_model("llama"), CONFIG).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


def test_any_stock_model_can_be_saved_so(tmp_path):
    dense = tiny_model("bert")
    ummrm.save_pretrained(dense, tmp_path / "bert", max_shard_size="20KB")
    assert loads_as(tmp_path / "bert", dense)


def test_processes_that_are_not_the_main_one_write_nothing(tmp_path):
    folder = tmp_path / "model"
    saved_model(folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    ummrm.upcycle(tiny_model("llama"), CONFIG).save_pretrained(folder, is_main_process=False)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
