"""What a public project keeps beside its code is true: workflows, hooks, citation, changelog, contributors' page."""

import re
from importlib import metadata

import nox
import pytest
import yaml
from checkout import ROOT

import ummrm

PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_one_version_and_one_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == metadata.version("ummrm") == ummrm.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    latest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert latest == ummrm.__version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_there_is(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    assert jobs and all(job["steps"] and job["timeout-minutes"] for job in jobs.values())
    uses = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.search(r"@v\d", use) for use in uses), uses
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([\w-]+)", "\n".join(commands)):
        assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.M), target


def test_wheels_bring_no_second_torch():
    options = PROJECT["tool"]["cibuildwheel"]
    for library in ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "'libgomp*'"):
        assert f"--exclude {library}" in options["repair-wheel-command"]
    torch = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert torch in options["before-build"] and torch in options["before-test"], "not the torch that is tested"
    tried = re.search(r"{project}/(\S+)", options["test-command"])[1]
    assert (ROOT / tried).is_file()


def test_hooks_are_those_of_lint():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for repository in repositories for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "end-of-file-fixer", "check-added-large-files"} <= set(hooks)
    assert hooks["mypy"]["stages"] == ["manual"]  # a minute without its cache is too long for each commit


def test_the_contributors_page_names_every_session_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    noxfile = (ROOT / "tools/noxfile.py").read_text()
    sessions = re.findall(r'^@nox\.session\((?:name="([^"]+)")?.*\)\ndef (\w+)', noxfile, re.M)
    assert len(sessions) > 10
    assert {name or function for name, function in sessions} <= set(re.findall(r"`([\w.-]+)`", text))
    paths = [path for path in re.findall(r"`((?:\w+/)+[\w.]*)`", text) if "my_op" not in path]
    assert len(paths) > 8 and [path for path in paths if not (ROOT / path).exists()] == []


def test_every_page_of_the_documentation_is_in_its_index():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
