"""Small files written atomically: a failure at any step leaves the old file alone and nothing beside it."""

import json
import os
import re

import pytest
from checkout import ROOT

from ummrm import files
from ummrm.files import write_atomically, write_json


def test_text_bytes_and_json_are_what_is_read(tmp_path):
    place = tmp_path / "a/b/file.txt"
    assert write_atomically(place, "ä\ud800\n") == place
    assert place.read_bytes() == "ä\\ud800\n".encode(), "a lone surrogate is written as its escape"
    write_atomically(str(place), lambda file: file.write(b"\xff"))
    assert place.read_bytes() == b"\xff"
    write_json(place, {"a": [1]})
    assert json.loads(place.read_text()) == {"a": [1]} and os.listdir(place.parent) == ["file.txt"]


@pytest.mark.parametrize("step", ["content", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(step, tmp_path, monkeypatch):
    place = write_atomically(tmp_path / "file.txt", "old")

    def fail(*_):
        assert place.read_text() == "old", "the new text must not be seen before it is whole"
        raise OSError("no room")

    if step != "content":
        monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="no room"):
        write_atomically(place, fail if step == "content" else "new")
    monkeypatch.undo()
    assert place.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    write_atomically(tmp_path / "file", "text")
    assert done == ["fsync", "replace", "fsync"], "the file, its name, and the folder that holds the name"


def test_what_is_no_plain_data_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert os.listdir(tmp_path) == []


def test_one_function_renames_small_files_and_one_list_names_dtypes():
    renames, lists = [], []
    for path in sorted((ROOT / "ummrm").rglob("*.py")):
        text = path.read_text()
        renames += [path.name] if "os.replace(" in text else []
        lists += (
            [path.name]
            if re.search(r"[({\[]\"float32\"(: 4)?, \"bfloat16\"(: 2)?, \"float16\"(: 2)?[)}\]]", text)
            else []
        )
    assert renames == ["files.py"], "others call it"
    assert lists == ["config.py"], "others import it"
