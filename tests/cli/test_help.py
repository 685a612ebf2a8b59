"""Help, completion, colours and narrow terminals: nothing is cut off, every example runs, wrong use is one line."""

import io
import json
import re
import shlex

import pytest
import yaml
from pipeline_inputs import write_backbone, write_pairs
from rich.console import Console
from rich.progress import Progress

from ummrm.cli import app
from ummrm.cli import help as help_page
from ummrm.cli import run as run_command
from ummrm.pipeline import StagePlan
from ummrm.pipeline.progress import _columns

COMMANDS = ("run", "upcycle", "train", "merge", "score", "evaluate", "inspect", "info")


def parsed():
    """The program as typer makes it."""
    import typer.main

    return typer.main.get_command(app)


@pytest.mark.parametrize("width", [24, 40, 80, 200])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_whole_at_every_width(name, width, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    done = command(*([name] if name else []), "--help")
    lines = done.out.splitlines()
    assert done.status == 0 and lines[0].startswith("Usage: ummrm") and not done.err
    one = parsed().commands[name] if name else parsed()
    words = done.out.split()
    for parameter in one.params:
        names = [parameter.name.upper()] if parameter.param_type_name == "argument" else parameter.opts
        texts = [parameter.help] if parameter.help else []
        assert parameter.help, f"{names[0]} says nothing"
        for shown in names:
            assert any(shown in word for word in words), f"{shown} is cut off"
        for text in texts:
            assert " ".join(text.split()).removesuffix(".") in " ".join(words), f"the text of {names[0]} is cut off"
    longest = max(map(len, lines))
    assert longest <= min(width, 100) or width == 24, max(lines, key=len)
    assert "Example:" in lines, "every command has one"
    if width >= 80:
        assert longest > 60, "a wide terminal is used"


def test_an_example_survives_copying_from_a_narrow_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = command("evaluate", "--help").out.splitlines()
    start = lines.index("Example:") + 1
    copied = "\n".join(lines[start : lines.index("", start)])
    assert "\\\n" in copied, "it is longer than the terminal is wide"
    assert shlex.split(copied.replace("\\\n", "")) == shlex.split(help_page.examples(parsed().commands["evaluate"])[0])


def test_every_example_runs(command, tmp_path, monkeypatch):
    """In one folder, in the order of a job: what one leaves the next one reads."""
    monkeypatch.chdir(tmp_path)
    backbone = write_backbone(tmp_path / "my-model")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "answers.jsonl").write_text('{"prompt": "w1", "response": " w2"}\n')
    recipe = {"model": str(backbone), "data": "pairs.jsonl", "output": "my-rm", "evaluate": {"probes": []}}
    recipe |= {"training": {"max_steps": 1}, "distill": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program = parsed()
    shown = {name: help_page.examples(program.commands[name]) for name in program.commands}
    assert set(shown) == set(COMMANDS) and all(shown.values())
    typed = [line for name in COMMANDS for line in shown[name]] + help_page.examples(program)
    left = {"my-rm/merged", "moe-rm", "trained-rm", "merged", "report/report.html", "experts.png"}
    for line in typed:
        name, *words = shlex.split(line.partition(" > ")[0])
        assert name == "ummrm"
        done = command(*words)
        assert done.status == 0, f"{line}: {done.err}"
    assert all((tmp_path / one).exists() for one in left)


def test_wrong_use_is_one_line(refused, command):
    for words, message in {
        ("run", "--outptu", "x", "recipe.yaml"): "No such option: --outptu",
        ("train", "one"): "Missing argument",
        ("upcycle", "a", "b", "--seed", "one"): "'--seed'",
        ("upcyle",): "upcyle",
        ("merge", "a", "b", "c"): "unexpected extra argument",
    }.items():
        line = refused(*words)
        assert message in line and line.endswith("--help"), line
    assert "see ummrm run --help" in refused("run")
    done = command()
    assert done.status == 2 and done.err.startswith("Usage: ummrm") and not done.out


def test_an_interrupted_command_says_so(command, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ummrm.cli.info.describe", interrupted)
    monkeypatch.setattr("ummrm.cli.info.read_folder", lambda *_: None)
    done = command("info", ".")
    assert done.status == 130 and done.err.strip().endswith("interrupted") and "Traceback" not in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_a_shell(shell, command, tmp_path, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the shell is then named, not found
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "40")
    shown = command("--show-completion", shell)
    assert shown.status == 0 and f"_UMMRM_COMPLETE=complete_{shell}" in shown.out and "ummrm" in shown.out
    done = command("--install-completion", shell)
    assert done.status == 0 and f"{shell} completion installed" in done.out and "\x1b" not in done.out
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(f"complete_{shell}" in path.read_text() for path in written), written
    monkeypatch.setenv("_UMMRM_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", "ummrm evaluate --pro")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "ummrm evaluate --pro")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    asked = command().out
    assert "--probes" in asked and "--probe-pairs" in asked and "--output" not in asked


def test_completion_finds_the_shell_that_is_running(command, tmp_path, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("zsh", "/bin/zsh"))
    assert "_UMMRM_COMPLETE=complete_zsh" in command("--show-completion").out


_COLOUR = re.compile(r"\x1b\[(\d+;)*(3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def test_no_color_is_respected(command, models, monkeypatch):
    """Under FORCE_COLOR, where there would be colours in a pipe too."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    words = ["--help"], ["info", "none"], ["merge", "moe", "out"], ["info", "moe"], ["run", "--outptu"]
    coloured = "".join(done.out + done.err for done in (command(*one) for one in words))
    assert _COLOUR.search(coloured), "otherwise this test could not fail"
    monkeypatch.setenv("NO_COLOR", "1")
    words = [*words[:2], ["merge", "moe", "other"], *words[3:]]
    plain = "".join(done.out + done.err for done in (command(*one) for one in words))
    assert not _COLOUR.search(plain) and "error: there is no folder" in re.sub(r"\x1b\[[\d;]*m", "", plain)


PLANS = [
    StagePlan(name, 28_000_000_000, 28_000_000_000, 12_345, 1.2e12, 3.4e21, 1e11, 1e11, 2e11, 5e10)
    for name in ("train", "distill")
]


@pytest.mark.parametrize("width", [40, 150])
def test_a_plan_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    run_command._show(PLANS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    for part in ("train", "distill", "parameters", "28,000,000,000", "12,345", "1.20e+12", "3.40e+21", "450 GB"):
        assert part in text, part
    assert len(lines) == (3 if width == 150 else 2 * 11)


@pytest.mark.parametrize("width", [40, 100])
def test_progress_fits_the_terminal(width):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, no_color=True)
    bar = Progress(*_columns(width), console=console)
    bar.add_task("distill", total=12_345, completed=1_234, loss="loss 0.693")
    console.print(bar.get_renderable())
    line = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()).splitlines()
    assert len(line) == 1 and len(line[0].rstrip()) <= width and "…" not in line[0]
    assert all(part in line[0] for part in ("distill", "1234/12345", "loss 0.693")), line
    assert ("━" in line[0]) == (width == 100)


def test_json_is_for_programs_at_every_width(command, models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert json.loads(command("info", "moe", "--json").out)["kind"] == "mixture"
