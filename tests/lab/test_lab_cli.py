"""The laboratory's command line: what it runs, what it writes, how it exits."""

import subprocess
import sys

import yaml
from checkout import ROOT
from tiny_study import tiny_study
from typer.testing import CliRunner

from lab.cli import app


def test_a_study_runs_only_what_is_asked_for(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tiny_study().to_dict()))
    arguments = ["run", tmp_path / "study.yaml", "--output", tmp_path, "--arms", "dense", "--optimisers", "best_of_n"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.glob("units/*")] == ["planted-0-dense-best_of_n.json"]


def test_a_users_error_is_one_line_and_an_exit_status():
    done = subprocess.run(
        [sys.executable, "-m", "lab", "demo", "none.yaml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "no recipe at none.yaml" in done.stderr and "Traceback" not in done.stderr
