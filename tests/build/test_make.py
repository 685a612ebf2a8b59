"""What `make` does again when something changes, read off its plans (`make -n`), and what the slow tier consists of;
nothing is built here."""

import json
import re
import shutil
import subprocess
import sys

import nox
import pytest
from checkout import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
FOLDERS = ("csrc", "kernels", "third_party")
SESSIONS = {"address", "thread", "csrc-sanitized", "cuda", "emulated", "ptx", "types", "transformers4.57", "full"}
SESSIONS |= {"python3.12-torch2.11", "triton3.6", "torch2.14", "distributions", "package"}
SESSIONS |= {"extras-lowest", "extras-newest", "deepspeed", "arm64"}
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "tools/build_backend.py", "tools/cuda_build.py")
FILES += ("tools/architectures.cmake",)


def sources():
    """One file of each kind in each folder that the extension is compiled from, and what compiles it."""
    kinds = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts:
                kinds[path.parent, path.suffix] = path.relative_to(ROOT).as_posix()
    return [*kinds.values(), *FILES]


@pytest.fixture
def plan(tmp_path):
    """Plans of a checkout whose set-up is done: its markers lie in a folder of this test."""
    for marker in (".made", ".torch", ".cmake", ".ummrm", ".real", ".test"):
        (tmp_path / marker).touch()

    def make(*arguments):
        command = ["make", "-n", f"VENV={tmp_path}", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return make


def test_nothing_is_built_again_without_a_change(plan):
    assert "pip" not in plan("demo") and "pip" not in plan("test")


@pytest.mark.parametrize("source", sources())
def test_a_changed_source_is_built_again(plan, source):
    assert re.search(r"pip .*install .*-e \"\.\[", plan("-W", source, "demo")), source


def test_the_benchmarks_begin_nothing_after_eight_minutes(plan):
    """The last case, plots and set-up have two more."""
    assert re.search(r"bench\.report --deadline 480$", plan("bench"), re.M)


def test_the_slow_tier_is_noxs():
    """Every session is listed, with what it does; one that is new belongs here and into CONTRIBUTING.md."""
    noxfile = str(ROOT / "tools/noxfile.py")
    command = [sys.executable, "-m", "nox", "-f", noxfile, "--list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sessions = {session["name"]: session["description"] for session in json.loads(done.stdout)}
    assert set(sessions) == SESSIONS and all(sessions.values())
    programs = re.findall(r'ROOT / "([\w/]+\.py)"', (ROOT / "tools/noxfile.py").read_text())
    assert len(programs) > 3 and [name for name in programs if not (ROOT / name).is_file()] == []


def test_what_cannot_run_in_the_slow_tier_is_a_failure(tmp_path):
    """On a machine without cmake, ninja and nvcc, nothing passes by being left out, and the reason is said."""
    noxfile = str(ROOT / "tools/noxfile.py")
    command = [sys.executable, "-m", "nox", "-f", noxfile, "-s", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path), "HOME": str(tmp_path)})
    assert done.returncode != 0 and "NOT RUN: there is no nvcc on PATH" in done.stderr


def test_what_users_need_is_bounded():
    """Each library that users get has a lower bound, which the full tier installs, and one on the next major."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    own = [requirement for requirement in extras["run"] if not requirement.startswith("ummrm[")]
    for requirement in [*project["dependencies"], *extras["cli"], *extras["trl"], *extras["triton"], *own]:
        assert re.match(r"[\w-]+>=[\d.]+,<\d+(;|$)", requirement), requirement
