"""Model folders damaged at random: every command ends in success or in one line and exit status 2."""

import contextlib
import io
import json
import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ummrm.cli import main

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([7.5, 1e30, 10**6, "", "llama", "x", "none"])
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(["a", "rope_type"]), SCALARS)
COMMANDS = {
    "dense": ("upcycle", "dense", "out"),
    "moe": ("merge", "moe", "out"),
    "merging": ("merge", "merging", "out"),
    "sequence": ("merge", "sequence", "out"),
}


def status(*arguments):
    """The exit status of a command, which must be 0, or 2 and one line."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["ummrm", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
    code, lines = exit.value.code or 0, said.getvalue().splitlines()
    assert code == 0 or (code == 2 and sum(line.startswith("error: ") for line in lines) == 1), lines
    assert "Traceback" not in said.getvalue() and max(map(len, lines), default=0) < 1500
    return code


def try_commands(folder, kind, out):
    for arguments in (COMMANDS[kind], ("info", kind), ("info", kind, "--json")):
        status(*arguments)
        shutil.rmtree(out, ignore_errors=True)
    assert status(*COMMANDS["merging" if kind == "dense" else "dense"]) == 0, "damage must not outlast a command"
    shutil.rmtree(out, ignore_errors=True)


def check_folders(models, examples):
    common = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
    kept = {kind: json.loads((models / kind / "config.json").read_text()) for kind in COMMANDS}
    weights = {kind: (models / kind / "model.safetensors").read_bytes() for kind in COMMANDS}
    places = [(kind, key) for kind in COMMANDS for key in kept[kind]]
    places += [(kind, f"umm.{key}") for kind in ("moe", "merging", "sequence") for key in kept[kind]["umm"]]
    places += [("merging", f"umm_merge.{key}") for key in kept["merging"]["umm_merge"]]

    def restore(kind):
        (models / kind / "config.json").write_text(json.dumps(kept[kind]))
        (models / kind / "model.safetensors").write_bytes(weights[kind])

    @settings(max_examples=examples, **common)
    @given(place=st.sampled_from(places), value=VALUES, drop=st.booleans())
    def one_entry_of_the_configuration(place, value, drop):
        kind, key = place
        config = json.loads(json.dumps(kept[kind]))
        section, _, field = key.rpartition(".")
        holder = config[section] if section else config
        if drop and value is None:
            del holder[field]
        else:
            holder[field] = value
        (models / kind / "config.json").write_text(json.dumps(config))
        try:
            try_commands(models / kind, kind, models / "out")
        finally:
            restore(kind)

    @settings(max_examples=examples, **common)
    @given(kind=st.sampled_from(list(COMMANDS)), data=st.data(), change=st.sampled_from(["cut", "byte", "config"]))
    def bytes_of_a_file(kind, data, change):
        name = "config.json" if change == "config" else "model.safetensors"
        path = models / kind / name
        content = bytearray(path.read_bytes())
        if change == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:  # the header's length, the header, or the text of the configuration
            content[data.draw(st.integers(0, min(len(content) - 1, 2000)))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content))
        try:
            try_commands(models / kind, kind, models / "out")
        finally:
            restore(kind)

    one_entry_of_the_configuration()
    bytes_of_a_file()


def test_damage_at_random(models):
    check_folders(models, 8)


@pytest.mark.full
def test_damage_at_random_at_length(models):
    check_folders(models, 400)
