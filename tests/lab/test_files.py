"""Output folders that cannot be used, and kept files that are damaged or altered: named before work, or made again."""

import json
import os
import shutil
import sys

import pytest
import torch
from tiny_study import tiny_study

from lab import run_study
from lab.arms import Arms
from lab.cli import main
from lab.demo import load_recipe, run_recipe
from lab.files import atomic, digest, write_atomically
from lab.store import UnitStore
from lab.units import Unit

ARMS = ("dense", "merged")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_study(tiny_study(), folder, ARMS, ("best_of_n",), progress=False)
    return folder


def table(folder):
    return (folder / "runs.csv").read_bytes()


# ---- output folders ----------------------------------------------------------------------------------------------


def no_work(*_, **__):
    raise AssertionError("work was begun")


def blocked(folder, how):
    """A folder that cannot serve as output, and what is said about it."""
    if how == "a file":
        (folder / "out").write_text("")
        return folder / "out", "be a folder that can be made and written to, got .*out: File exists"
    if how == "a pipe":
        os.mkfifo(folder / "out")
        return folder / "out", "be a folder that can be made and written to"
    if how == "below a file":
        (folder / "file").write_text("")
        return folder / "file" / "out", "be a folder that can be made and written to, got .*out: Not a directory"
    if how == "no place to write":
        return "/proc/out", "be a folder that can be made and written to, got /proc/out"
    name = {"a file at merged": "merged", "a file at units": "units"}.get(how)
    if name is not None:
        (folder / name).write_text("")
        return folder, f"hold nothing in the way of what is written, and .*{name} is no folder"
    name = how.removeprefix("a pipe at ")
    os.mkfifo(folder / name)
    return folder, f"hold nothing in the way of what is written, and .*{name} is no file"


ANYWHERE = ("a file", "a pipe", "below a file", "no place to write")


@pytest.mark.parametrize("how", [*ANYWHERE, "a file at merged", "a pipe at table.txt"])
def test_an_output_that_a_demo_cannot_use_is_refused_before_any_work(how, tmp_path, monkeypatch):
    monkeypatch.setattr("lab.demo.job.build_task", no_work)
    output, message = blocked(tmp_path, how)
    with pytest.raises(ValueError, match=f"`output` must {message}"):
        run_recipe(load_recipe("demo"), output, progress=False)


@pytest.mark.parametrize("how", [*ANYWHERE, "a file at units", "a pipe at .lock", "a pipe at runs.csv"])
def test_an_output_that_a_study_cannot_use_is_refused_before_any_work(how, tmp_path, monkeypatch):
    monkeypatch.setattr("lab.run.run_group", no_work)
    output, message = blocked(tmp_path, how)
    with pytest.raises(ValueError, match=f"`output` must {message}"):
        run_study(tiny_study(), output, progress=False)


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(sys, "argv", ["lab", "demo", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and "choose another one" in said


def test_missing_parents_of_an_output_are_made(tmp_path):
    run_study(tiny_study(), tmp_path / "a" / "b", ("dense",), ("best_of_n",), progress=False)
    assert (tmp_path / "a" / "b" / "runs.csv").is_file()


# ---- units -------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_text(path.read_text()[:200])


def flatter(path):
    path.write_text(path.read_text().replace('"gold_at_kl": ', '"gold_at_kl": 9'))


def undigested(path):
    found = json.loads(path.read_text())
    del found["digest"]
    path.write_text(json.dumps(found))


def another(path):
    shutil.copy(path.with_name("planted-0-dense-best_of_n.json"), path)


@pytest.mark.parametrize("harm", [cut, flatter, undigested, another, lambda path: path.write_text("null")])
def test_a_damaged_or_altered_unit_is_named_and_run_again(harm, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    path = folder / "units" / "planted-0-merged-best_of_n.json"
    before = path.read_text()
    harm(path)
    assert path.read_text() != before
    with pytest.warns(UserWarning, match=f"{path.name} is damaged .* it is made again"):
        run_study(tiny_study(), folder, ARMS, ("best_of_n",), progress=False)
    assert table(folder) == table(finished)


def test_a_unit_that_is_altered_while_a_study_runs_enters_no_table(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "study")
    path = folder / "units" / "planted-0-merged-best_of_n.json"
    monkeypatch.setattr("lab.run.run_groups", lambda *_, **__: flatter(path))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=f"{path.name} .*changed.*same command again"):
        run_study(tiny_study(), folder, ARMS, ("best_of_n",), progress=False)


# ---- stages ------------------------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    kept = torch.load(path, weights_only=True)
    next(iter(kept["state"].values())).view(-1)[0] += 1
    torch.save(kept, path)


@pytest.mark.parametrize("harm", [truncated, flipped, lambda path: path.write_bytes(b"")])
def test_a_damaged_stage_is_named_and_made_again(harm, tmp_path):
    first = Arms(tiny_study(), "planted", 0, tmp_path)
    scores = first.make("dense")(first.reference)
    (path,) = tmp_path.glob("dense-0-*.pt")
    harm(path)
    again = Arms(tiny_study(), "planted", 0, tmp_path)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged .* it is made again"):
        assert torch.equal(again.make("dense")(again.reference), scores)
    steps = []
    third = Arms(tiny_study(), "planted", 0, tmp_path, on_step=lambda *event: steps.append(event))
    assert torch.equal(third.make("dense")(third.reference), scores) and steps == []


def test_what_an_interrupted_study_left_is_not_taken_for_an_edited_task(tmp_path):
    left = tiny_study()
    Arms(left, "planted", 0, tmp_path).make("dense")
    data = left.to_dict()
    data["regimes"]["planted"]["task"]["label_noise"] = 0.3
    edited, alone = type(left).from_dict(data), type(left).from_dict(data)
    resumed, fresh = Arms(edited, "planted", 0, tmp_path), Arms(alone, "planted", 0)
    assert torch.equal(resumed.make("dense")(fresh.reference), fresh.make("dense")(fresh.reference))
    assert not torch.equal(
        resumed.make("dense")(fresh.reference), Arms(left, "planted", 0).make("dense")(fresh.reference)
    )


# ---- atomic writing ----------------------------------------------------------------------------------------------


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    store = UnitStore(tmp_path)
    store.write(Unit("r", 0, "a", "best_of_n"), "f", {})
    assert calls == [f".r-0-a-best_of_n.json.{os.getpid()}", "rename", "units"]
    calls.clear()
    Arms(tiny_study(), "planted", 0, tmp_path / "stages").make("dense")
    assert calls[0].startswith(".dense-0-") and calls[1:] == ["rename", "stages"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a") as beside:
        beside.write_text("new")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_digests_tell_structures_apart():
    values = [[[], []], [[[]]], [[1]], [1, []], {"a": [1]}, {"a": {"1": []}}, {"a": 1}, [1], "1", 1]
    assert len({digest(value) for value in values}) == len(values)
