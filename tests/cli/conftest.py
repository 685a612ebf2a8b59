"""What the command line's tests share: folders of tiny models, made once, and `main()` run in this process."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig
from ummrm.cli import main


@pytest.fixture(scope="session")
def kept_folders(tmp_path_factory):
    """One dense model, its mixture, the mixture in its merge phase, and one whose linear layers are by sequence."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dense = tiny_model("llama")
    dense.save_pretrained(root / "dense")
    sequence = UpcycleConfig(assignment="sequence", num_experts=3, experts_in="linear", layers=(1,))
    perturb_experts(ummrm.upcycle(dense, sequence, copy=True)).save_pretrained(root / "sequence")
    moe = ummrm.upcycle(dense, UpcycleConfig(num_experts=3, num_experts_per_tok=2))
    perturb_experts(moe).save_pretrained(root / "moe")
    ummrm.prepare_merge(moe).save_pretrained(root / "merging")
    return root


@pytest.fixture
def models(kept_folders, tmp_path, monkeypatch):
    """A folder of a test's own with `dense`, `moe` and `merging` in it, which is the current one too."""
    for kept in kept_folders.iterdir():
        shutil.copytree(kept, tmp_path / kept.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `ummrm ARGUMENTS` in this process; returns its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ummrm", *(str(a) for a in arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(status=exit.value.code or 0, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must end in one line of error, exit status 2, and a disk as it was; returns the line."""

    def run(*arguments):
        before = _tree(Path.cwd())
        done = command(*arguments)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.status == 2 and len(errors) == 1, done.out + done.err
        assert "Traceback" not in done.err and len(done.err.splitlines()) <= 4, done.err
        assert _tree(Path.cwd()) == before, "a refused command must leave the disk as it was"
        return errors[0]

    return run


def _tree(root):
    return {
        path: (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        for path in sorted(root.rglob("*"))
        for stat in [path.lstat()]
        if not path.is_dir()
    } | {path: None for path in root.rglob("*") if path.is_dir()}
