"""A model folder is whole or not there: kill a save at any moment and the previous folder still loads."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkout import SUPPORT
from saving_child import CONFIG, make_model
from tiny_models import outputs_of, padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm.hf import saving

OLD, NEW = 0, 1  # seeds of the model in the folder and of the one whose save is killed


@pytest.fixture(scope="module")
def killed_save():
    """Runs a save that is killed at its `die_at`-th step: None then, or the number of steps of one that got through."""
    script = SUPPORT / "saving_child.py"
    server = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(folder, die_at, merged=False, exchange=True):
        request = {"folder": str(folder), "die_at": die_at, "seed": NEW, "merged": merged, "exchange": exchange}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        result = next(line.split()[1] for line in server.stdout if line.startswith("RESULT"))
        return None if result == "killed" else int(result)

    yield run
    server.stdin.close()
    assert server.wait(60) == 0


def saved_model(folder, merged=False):
    model = make_model(OLD, merged)
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
        except Exception:
            continue
        found.append(config.parent)
    return found


@pytest.mark.parametrize("merged", [False, True], ids=["moe", "merged"])
def test_kill_9_at_every_step_of_a_save(killed_save, merged, tmp_path):
    folder = tmp_path / "model"
    old, new = saved_model(folder, merged), make_model(NEW, merged)
    outcomes = []
    while (steps := killed_save(folder, len(outcomes) + 1, merged)) is None:
        is_old, is_new = loads_as(folder, old), loads_as(folder, new)
        assert is_old != is_new, f"killed at step {len(outcomes) + 1}"
        assert (folder / "tokenizer.json").read_text() == "{}"
        outcomes.append(is_new)
        if is_new:  # put the old folder back, so that every step is tried on the same ground
            saved_model(folder, merged)
    assert steps == len(outcomes) > 12
    assert outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1], "old until one moment, new from then on"
    assert loads_as(folder, new)
    assert os.listdir(tmp_path) == ["model"], "the next whole save clears what the killed ones left"


def test_kill_9_where_the_file_system_cannot_exchange(killed_save, tmp_path):
    """Moved aside first: a kill between the two renames is mended by the next save, and nothing is lost."""
    folder = tmp_path / "model"
    old, new = saved_model(folder), make_model(NEW, False)
    missing, step = 0, 1
    while killed_save(folder, step, exchange=False) is None:
        step += 1
        if not folder.exists():
            missing += 1
            (aside,) = [p for p in tmp_path.rglob("model.old") if p.is_dir()]
            assert loads_as(aside, old)
            saving._clear_leftovers(folder)
        if loads_as(folder, new):
            saved_model(folder)
        assert loads_as(folder, old)
    assert missing == 1, "exactly one kill falls between the two renames"
    assert loads_as(folder, new)


def test_a_killed_first_save_leaves_nothing_half_written_that_loads(killed_save, tmp_path):
    new = make_model(NEW, False)
    step = 1
    while killed_save(tmp_path / "model", step) is None:
        for folder in loadable_folders(tmp_path):
            assert loads_as(folder, new), f"killed at step {step}"
        step += 1
        if (tmp_path / "model").exists():
            break
    assert step > 8 and loads_as(tmp_path / "model", new)


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
    model = make_model(OLD, merged=False)
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


def test_the_current_folder_cannot_be_exchanged_under_the_process(tmp_path, monkeypatch):
    saved_model(tmp_path / "model")
    before = sorted(os.listdir(tmp_path / "model"))
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(ValueError, match="got ., the current folder; save into a folder below it"):
        make_model(NEW, merged=False).save_pretrained(".")
    assert sorted(os.listdir(".")) == before


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
