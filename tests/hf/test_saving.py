"""Saves touch only what they write, and are atomic, in folders full of other people's things."""

import json
import os
import socket
import stat
import subprocess
import threading
import time
import warnings

import pytest
import torch
from saved_folders import MODELS, NEW, OLD, SHARDS, loads_as, same, snapshot, stock_load
from saving_child import CONFIG
from tiny_models import outputs_of, padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm.hf import replacing
from ummrm.hf.loading import load_checkpoint


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small file system on a folder; unmounted afterwards."""
    points = []

    def mount(point, *options):
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", point], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user can't mount a file system: {done.stderr.strip()}")
        points.append(point)

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", point], check=True)


def test_a_volume_below_the_folder_and_one_that_is_the_folder_keep_what_they_hold(tmp_path, mounted):
    folder = tmp_path / "model"
    (folder / "data").mkdir(parents=True)
    mounted(folder)
    (folder / "data").mkdir()
    mounted(folder / "data")
    (folder / "data" / "pairs.jsonl").write_text("precious")
    for seed in (OLD, NEW):
        ummrm.save_pretrained(MODELS[seed, False], folder)
        assert loads_as(folder, MODELS[seed, False])
    assert os.path.ismount(folder / "data") and (folder / "data" / "pairs.jsonl").read_text() == "precious"


def test_files_that_others_write_during_a_save_stay(tmp_path):
    folder = tmp_path / "model"
    ummrm.save_pretrained(MODELS[OLD, False], folder)
    written, done = [], threading.Event()

    def write():
        while not done.is_set():
            path = folder / "logs" / f"{len(written)}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("log")
            written.append(path)
            time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    saves = 0
    while writer.is_alive() and (saves < 3 or len(written) <= 20):
        ummrm.save_pretrained(MODELS[NEW, False], folder, max_shard_size=SHARDS[NEW, False])
        saves += 1
    done.set()
    writer.join()
    assert len(written) > 20 and all(path.read_text() == "log" for path in written)


@pytest.mark.parametrize("where", [".", ".."])
def test_the_working_directory_and_what_lies_in_it_survive_a_save_into_or_above_it(where, tmp_path, monkeypatch):
    here = tmp_path / "project" / "here"
    here.mkdir(parents=True)
    (here / "notes.txt").write_text("mine")
    (here / "link").symlink_to("notes.txt")
    monkeypatch.chdir(here)
    before = snapshot(here), os.stat(here).st_ino
    ummrm.save_pretrained(MODELS[NEW, False], where)
    assert loads_as(here if where == "." else here.parent, MODELS[NEW, False])
    after = {name: what for name, what in snapshot(here).items() if name in before[0]}
    assert (after, os.stat(os.curdir).st_ino) == before and (here / "notes.txt").exists()


def special_file(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    elif kind == "device":  # one of the test's own: a save that went wrong would replace it
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("this user can't make a device")
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("led to"))
        path.symlink_to("led to")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("pipe", "a named pipe"), ("socket", "a socket"), ("file", "a file"), ("device", "a device")],
)
def test_what_is_no_folder_is_neither_followed_nor_replaced(kind, words, tmp_path):
    special_file(tmp_path / "model", kind)
    before = os.lstat(tmp_path / "model")
    with pytest.raises(NotADirectoryError, match=f"must be a folder, got {words}.*: .*model; choose another path"):
        ummrm.save_pretrained(MODELS[NEW, False], tmp_path / "model")
    assert os.lstat(tmp_path / "model") == before and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("pipe", "config.json"), ("pipe", "README.md"), ("socket", "config.json"), ("device", "config.json")]
    + [(kind, "model-00001-of-00002.safetensors") for kind in ("pipe", "folder", "link to a pipe")],
)
def test_what_is_no_file_at_the_name_of_a_file_is_a_clear_error(kind, name, tmp_path):
    special_file(tmp_path / name, kind)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=f"must hold a plain file or nothing at {name}, which the save writes"):
        ummrm.save_pretrained(MODELS[NEW, True], tmp_path, max_shard_size="40KB")
    assert snapshot(tmp_path) == before


def test_pipes_and_links_elsewhere_in_the_folder_are_left_alone(tmp_path):
    """A pipe that nobody reads would hang whoever opens it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "pipe")
    outside = tmp_path.parent / "outside.json"
    outside.write_text("{}")
    (tmp_path / "config.json").symlink_to(outside)  # a file that is written: the link is replaced, not followed
    (tmp_path / "tokenizer.json").symlink_to(outside)
    ummrm.save_pretrained(MODELS[NEW, False], tmp_path)
    assert loads_as(tmp_path, MODELS[NEW, False]) and outside.read_text() == "{}"
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and stat.S_ISFIFO(os.stat(tmp_path / "logs/pipe").st_mode)
    assert os.readlink(tmp_path / "tokenizer.json") == str(outside) and not (tmp_path / "config.json").is_symlink()


def test_a_folder_can_be_saved_to_whatever_may_be_done_with_its_parent(tmp_path, mounted):
    """A file system that is read-only around the folder: what no permission bit does to root."""
    mounted(tmp_path)
    parent = tmp_path / "parent"
    (parent / "model").mkdir(parents=True)
    mounted(parent / "model")
    subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (parent / "other").mkdir()
    ummrm.save_pretrained(MODELS[NEW, False], parent / "model")
    assert loads_as(parent / "model", MODELS[NEW, False])


def test_a_save_replaces_weights_of_another_sharding_and_keeps_the_rest_with_its_modes(tmp_path):
    model = MODELS[OLD, False]
    ummrm.save_pretrained(model, tmp_path, max_shard_size=SHARDS[NEW, False])
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    kept = ["tokenizer.json", "pytorch_model.bin", "model-00001-of-00009.safetensors", "model-of-mine.safetensors"]
    for name in kept:  # none of them is named by the index
        (tmp_path / name).write_text(name)
    modes = stat.S_IMODE((tmp_path / "tokenizer.json").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {modes}, "as the umask has it"
    os.chmod(tmp_path, 0o750)
    os.chmod(tmp_path / "config.json", 0o640)
    inode = os.stat(tmp_path).st_ino
    ummrm.save_pretrained(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "config.json", "model.safetensors"])
    assert all((tmp_path / name).read_text() == name for name in kept)
    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o640
    assert (stat.S_IMODE(os.stat(tmp_path).st_mode), os.stat(tmp_path).st_ino) == (0o750, inode)
    loaded, batch = AutoModelForSequenceClassification.from_pretrained(tmp_path), padded_batch()
    torch.testing.assert_close(outputs_of(loaded, batch), outputs_of(model, batch), rtol=1e-5, atol=1e-6)


def test_an_index_that_names_files_elsewhere_removes_none(tmp_path):
    outside, folder = tmp_path / "model-00001-of-00001.safetensors", tmp_path / "model"
    outside.write_text("precious")
    folder.mkdir()
    index = {"weight_map": {"a": "../model-00001-of-00001.safetensors", "b": str(outside), "c": 3, "d": "config.json"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ummrm.save_pretrained(MODELS[NEW, False], folder)
    assert outside.read_text() == "precious" and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@pytest.mark.parametrize("base", [False, True], ids=["adapter alone", "base and adapter"])
def test_a_full_save_leaves_no_adapter_that_would_be_put_on_the_new_weights(base, tmp_path):
    """transformers puts an adapter in the folder on whatever weights it finds there, and says nothing."""
    if base:
        ummrm.save_pretrained(MODELS[OLD, False], tmp_path)
    for name in ADAPTER:
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    if base:
        with pytest.raises(ValueError, match="must hold one model, and has an adapter_config.json beside"):
            load_checkpoint(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="disk full"):
        rename = os.rename

        def refuse(source, target):
            if os.fspath(target) == str(tmp_path / "config.json") and "new" in source.parts:
                patch.setattr(os, "rename", rename)
                assert not any((tmp_path / name).exists() for name in ADAPTER)
                raise OSError("disk full")
            if os.path.basename(source).startswith("adapter_model"):
                assert not (tmp_path / "adapter_config.json").exists(), "half an adapter would be loaded"
            rename(source, target)

        patch.setattr(os, "rename", refuse)
        ummrm.save_pretrained(MODELS[NEW, False], tmp_path)
    assert snapshot(tmp_path) == before
    ummrm.save_pretrained(MODELS[NEW, False], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt"]
    assert loads_as(tmp_path, MODELS[NEW, False])


def test_an_adapter_that_somebody_wrote_since_an_interrupted_save_is_not_put_on_its_weights(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    interrupted(tmp_path, MODELS[NEW, False], 1)
    (tmp_path / "adapter_config.json").write_text('{"newer": 1}')
    with pytest.warns(UserWarning, match="somebody else has written adapter_config.json there since"):
        replacing.settle(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == '{"newer": 1}'
    assert not (tmp_path / "config.json").exists() and not (tmp_path / replacing.PENDING).exists()


@pytest.mark.parametrize("fails", ["staging", "moving"])
def test_a_failed_save_leaves_the_folder_as_it_was(fails, tmp_path, monkeypatch):
    ummrm.save_pretrained(MODELS[OLD, False], tmp_path, max_shard_size=SHARDS[OLD, False])
    before, rename = snapshot(tmp_path), os.rename

    def full(*args, **kwargs):
        raise OSError("disk full")

    def refuse(source, target):
        if (target.parent, target.name) == (tmp_path, "model.safetensors.index.json") and "new" in source.parts:
            raise OSError("disk full")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        if fails == "staging":
            patch.setattr("transformers.modeling_utils.safe_save_file", full)
        else:
            move_back = replacing._move_back
            patch.setattr(os, "rename", refuse)
            patch.setattr(
                replacing, "_move_back", lambda *args: (patch.setattr(os, "rename", rename), move_back(*args))
            )
        ummrm.save_pretrained(MODELS[NEW, False], tmp_path, max_shard_size=SHARDS[NEW, False])
    assert snapshot(tmp_path) == before
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        ummrm.save_pretrained(MODELS[NEW, False], tmp_path / "a" / "b")
    assert snapshot(tmp_path) == before, "folders that were made go again"


def test_a_save_that_is_in_place_does_not_fail_at_its_cleaning_up(tmp_path, monkeypatch):
    ummrm.save_pretrained(MODELS[OLD, False], tmp_path)

    def refuse(*args):
        raise OSError("stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(replacing, "_discard", refuse)
        ummrm.save_pretrained(MODELS[NEW, False], tmp_path)
    assert loads_as(tmp_path, MODELS[NEW, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_checkpoint(tmp_path).state_dict(), MODELS[NEW, False])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def interrupted(folder, model, moves):
    """Leaves `folder` as a save of `model` does that is killed after `moves` renames in the folder itself."""
    with pytest.MonkeyPatch.context() as patch:
        move_in, rename, count = replacing._move_in, os.rename, [0]

        def cut(source, target):
            if count[0] == moves:
                raise KeyboardInterrupt
            count[0] += 1
            rename(source, target)

        def stop(*args):
            patch.setattr(os, "rename", cut)
            try:
                move_in(*args)
            finally:
                patch.setattr(os, "rename", rename)

        patch.setattr(replacing, "_move_in", stop)
        patch.setattr(replacing, "_move_back", lambda *args: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            ummrm.save_pretrained(model, folder)


def test_a_load_of_ours_completes_an_interrupted_save_and_says_so(tmp_path):
    ummrm.save_pretrained(MODELS[OLD, False], tmp_path)
    interrupted(tmp_path, MODELS[NEW, False], 2)
    assert stock_load(tmp_path) is None
    with pytest.warns(UserWarning, match=f"a save into {tmp_path} was interrupted, and is completed now"):
        loaded = type(MODELS[NEW, False]).from_pretrained(tmp_path)
    assert same(loaded.state_dict(), MODELS[NEW, False]) and loads_as(tmp_path, MODELS[NEW, False])


def test_where_somebody_wrote_the_folder_since_an_interrupted_save_nothing_is_lost(tmp_path):
    ummrm.save_pretrained(MODELS[OLD, True], tmp_path, max_shard_size=SHARDS[OLD, True])
    interrupted(tmp_path, MODELS[NEW, True], 4)
    type(MODELS[OLD, True]).save_pretrained(MODELS[OLD, True], tmp_path)  # stock transformers
    with pytest.warns(UserWarning, match="somebody else has written config.json there since: .*lies in .*ummrm-interr"):
        loaded = load_checkpoint(tmp_path)
    assert same(loaded.state_dict(), MODELS[OLD, True])
    assert sum(p.suffix == ".safetensors" for p in tmp_path.rglob("ummrm-interrupted-save-*/*/**/*")) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_checkpoint(tmp_path).state_dict(), MODELS[OLD, True])


def test_a_folder_without_write_permission_loads_where_nothing_is_missing(tmp_path, mounted):
    mounted(tmp_path)
    for name, moves in (("begun", 0), ("between", 2)):
        ummrm.save_pretrained(MODELS[OLD, False], tmp_path / name)
        interrupted(tmp_path / name, MODELS[NEW, False], moves)
    subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
    with pytest.warns(UserWarning, match="is forgotten"):
        assert same(load_checkpoint(tmp_path / "begun").state_dict(), MODELS[OLD, False])
    with pytest.raises(OSError, match="was interrupted and can't be completed: .*Read-only.*Give write permission"):
        load_checkpoint(tmp_path / "between")


def test_a_save_that_is_going_on_is_left_alone(tmp_path, monkeypatch):
    ummrm.save_pretrained(MODELS[OLD, False], tmp_path)
    staging = replacing.Staging(tmp_path, "model")  # of a live process: this one
    (staging.files / "model.safetensors").write_text("half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ummrm.save_pretrained(MODELS[NEW, False], tmp_path)
        load_checkpoint(tmp_path)
    assert (staging.files / "model.safetensors").read_text() == "half" and loads_as(tmp_path, MODELS[NEW, False])
    os.rename(staging.path, tmp_path / replacing.PENDING)
    monkeypatch.setattr(replacing, "_PATIENCE", 0.2)
    for use in (lambda: load_checkpoint(tmp_path), lambda: ummrm.save_pretrained(MODELS[OLD, False], tmp_path)):
        with pytest.raises(TimeoutError, match="is being written by another process"):
            use()
    assert (tmp_path / replacing.PENDING / "new/model/model.safetensors").read_text() == "half"


def test_saves_at_once_into_one_folder_leave_one_of_them(tmp_path):
    failures = []

    def save(model, shards):
        try:
            for _ in range(4):
                ummrm.save_pretrained(model, tmp_path, max_shard_size=shards)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(MODELS[s, False], k)) for s, k in ((OLD, "30KB"), (NEW, "20KB"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and (loads_as(tmp_path, MODELS[OLD, False]) or loads_as(tmp_path, MODELS[NEW, False]))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("what", ["names", "link", "nonsense"])
def test_a_record_that_came_with_a_download_moves_nothing_in_from_outside(what, tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    pending = folder / replacing.PENDING
    (pending / "new").mkdir(parents=True)
    (pending / "old").mkdir()
    (outside / "name").mkdir(parents=True)
    (outside / "name" / "config.json").write_text("precious")
    journal = {"name": "name", "files": ["config.json"], "stale": [], "gate": "config.json"}
    if what == "names":
        journal |= {"name": "..", "files": ["../../outside/name/config.json"], "gate": None}
    elif what == "link":
        (pending / "new" / "name").symlink_to(outside / "name")
    (pending / "journal.json").write_text("[" if what == "nonsense" else json.dumps(journal))
    (pending / "lock").write_text(replacing._owner())
    before = snapshot(tmp_path)
    for use in (lambda: load_checkpoint(folder), lambda: ummrm.save_pretrained(MODELS[NEW, False], folder)):
        with pytest.raises(ValueError, match="no record of a save that ummrm can read"):
            use()
    assert snapshot(tmp_path) == before


def test_saving_through_a_link_writes_what_it_leads_to_under_the_name_of_the_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    names = []
    stock = type(MODELS[NEW, True]).save_pretrained
    monkeypatch.setattr(
        type(MODELS[NEW, True]),
        "save_pretrained",
        lambda self, p, **kw: (names.append(os.path.basename(p)), stock(self, p, **kw)),
    )
    for name in ("link", "dangling"):
        ummrm.save_pretrained(MODELS[NEW, True], tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert loads_as(tmp_path / "real", MODELS[NEW, True]) and loads_as(tmp_path / "later", MODELS[NEW, True])
    assert names == ["link", "dangling"], "transformers names a repository on the hub after the folder"


def test_any_stock_model_can_be_saved_so_and_a_state_dict_of_the_users(tmp_path):
    dense = tiny_model("bert")
    state = {key: tensor + 1 for key, tensor in dense.state_dict().items()}
    ummrm.save_pretrained(dense, tmp_path / "bert", max_shard_size="20KB", state_dict=state)
    loaded = stock_load(tmp_path / "bert")
    assert all(torch.equal(loaded[key], dense.state_dict()[key] + 1) for key in loaded)


def test_processes_that_are_not_the_main_one_write_nothing(tmp_path):
    ummrm.save_pretrained(MODELS[OLD, False], tmp_path)
    before = snapshot(tmp_path)
    ummrm.upcycle(tiny_model("llama"), CONFIG).save_pretrained(tmp_path, is_main_process=False)
    assert snapshot(tmp_path) == before
