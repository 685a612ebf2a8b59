"""A model that comes with code of its own: refused without --trust-remote-code, in a job of every command with it."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from own_code import modules_in, write_own_model, write_own_tokenizer
from pipeline_inputs import write_backbone, write_pairs

from ummrm.hf.loading import load_checkpoint

TRUST = "--trust-remote-code"
ONE_STEP = ["--max-steps", 1, "--per-device-train-batch-size", 4]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with modules_in(tmp_path_factory.mktemp("modules")) as cache:
        yield cache


@pytest.fixture
def folder(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))  # of processes that are started
    write_pairs(tmp_path / "pairs.jsonl", 24)
    return tmp_path


def rewards(done):
    assert done.status == 0, done.err
    return [json.loads(line)["reward"] for line in done.out.splitlines()]


def test_every_command_refuses_code_and_runs_it_when_it_is_trusted(folder, cache, command, refused, monkeypatch):
    write_own_model(folder / "own", "own_jobs")
    (folder / "texts.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w3"}\n')
    recipe = {"model": "own", "data": "pairs.jsonl", "output": "job", "evaluate": {"probes": []}, "dense": True}
    recipe |= {"training": {"max_steps": 1, "per_device_train_batch_size": 4}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = {
        "score": ["score", "own", "texts.jsonl"],
        "evaluate": ["evaluate", "own", "--data", "pairs.jsonl", "--output", "report", "--probes", "none"],
        "upcycle": ["upcycle", "own", "moe", "--assignment", "sequence", "--experts-in", "linear"],
        "train": ["train", "own", "pairs.jsonl", "dense-rm", *ONE_STEP],
        "run": ["run", "recipe.yaml"],
    }
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody must be asked"))
    for words in (*commands.values(), ["run", "recipe.yaml", "--dry-run"]):
        line = refused(*words)
        assert "comes with code of its own" in line and TRUST in line, line
    copied = [path for path in cache.rglob("configuration_own.py") if "own_jobs" in path.read_text()]
    assert not copied, "it was not even copied to where it would be run"
    for words in commands.values():
        done = command(*words, TRUST)
        assert done.status == 0, f"{words}: {done.err}"
    done = command("run", "recipe.yaml", "--dry-run", TRUST, "--output", "new")
    assert done.status == 0 and "distill" in done.out, done.err
    before = rewards(command("score", "own", "texts.jsonl", TRUST))
    assert rewards(command("score", "moe", "texts.jsonl", TRUST)) == pytest.approx(before, abs=1e-5)
    done = command("train", "moe", "pairs.jsonl", "moe-rm", *ONE_STEP, TRUST)
    assert done.status == 0, done.err
    for words in (["inspect", "moe-rm"], ["merge", "moe-rm", "merged"], ["merge", "job/mixture", "job-merged"]):
        done = command(*words, TRUST)
        assert done.status == 0, f"{words}: {done.err}"
    assert json.loads(command("info", "moe", "--json").out)["kind"] == "mixture"
    for name in ("merged", "job-merged", "job/merged", "job/dense", "dense-rm"):
        saved = json.loads((folder / name / "config.json").read_text())
        assert saved["model_type"] == "own_jobs" and saved["architectures"] == ["OwnForSequenceClassification"], name
        assert len(saved["auto_map"]) == 3 and not any(key.startswith("umm") for key in saved), name
        assert {"configuration_own.py", "modeling_own.py"} <= {path.name for path in (folder / name).iterdir()}, name
    for name in ("moe", "moe-rm", "job/mixture"):
        saved = json.loads((folder / name / "config.json").read_text())
        assert "auto_map" not in saved and set(saved["umm_code"]) > {"AutoConfig"}, name
        assert (folder / name / "modeling_own.py").is_file(), name


LATER = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
from transformers import AutoModelForSequenceClassification
stock = AutoModelForSequenceClassification.from_pretrained("merged", trust_remote_code=True)
assert "ummrm" not in sys.modules
ids = torch.tensor([[5, 6, 7]])
with torch.no_grad():
    print(stock.eval()(input_ids=ids).logits.item())
    from ummrm.hf.loading import load_checkpoint
    try:
        load_checkpoint("moe")
    except ValueError as error:
        assert "comes with code of its own" in str(error), error
    print(load_checkpoint("moe", trust_remote_code=True)(input_ids=ids).logits.item())
"""


def test_what_was_made_of_it_loads_where_nothing_is_registered(folder, command):
    """The merged model in stock transformers, the mixture by ummrm, in a process that has seen neither."""
    write_own_model(folder / "own", "own_later")
    assert command("upcycle", "own", "moe", "--assignment", "sequence", TRUST).status == 0
    assert command("merge", "moe", "merged", TRUST).status == 0
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stock, mixture = map(float, done.stdout.split())
    assert stock == pytest.approx(mixture, abs=1e-5)


def test_a_class_of_a_known_family_is_trained_and_scored_and_not_upcycled(folder, command, refused):
    """As reward models on the hub have it: Llama's own model_type, and a head that only their code knows."""
    write_own_model(folder / "own", "llama")
    assert "OwnForSequenceClassification" in command("score", "own", "pairs.jsonl").err
    done = command("train", "own", "pairs.jsonl", "dense-rm", *ONE_STEP, TRUST)
    assert done.status == 0, done.err
    model = load_checkpoint("dense-rm", trust_remote_code=True)
    assert type(model).__name__ == "OwnForSequenceClassification"
    moved = load_checkpoint("own", trust_remote_code=True).score.weight - model.score.weight
    assert moved.abs().max() > 0 and torch.isfinite(moved).all()
    assert "OwnForSequenceClassification" in refused("upcycle", "own", "moe", TRUST)


def test_a_tokenizer_with_code_of_its_own(folder, command, refused):
    write_own_tokenizer(write_backbone(folder / "own"))
    words = ["train", "own", "pairs.jsonl", "dense-rm", *ONE_STEP]
    assert "code of its own" in refused(*words)
    done = command(*words, TRUST)
    assert done.status == 0, done.err


def test_code_that_can_not_be_used_is_named(folder, refused):
    write_own_model(folder / "own", "own_broken")
    path = folder / "own/configuration_own.py"
    for text, message in {
        path.read_text().replace("own_broken", "another"): "its config.json says model_type 'own_broken'",
        "import no_such_library_anywhere\n": "no_such_library_anywhere",
        "raise KeyError('a bug of theirs')\n": "a bug of theirs",
    }.items():
        path.write_text(text)
        assert message in refused("upcycle", "own", "moe", TRUST)
        assert message in refused("train", "own", "pairs.jsonl", "out", TRUST)
    config = json.loads((folder / "own/config.json").read_text())
    del config["auto_map"]["AutoConfig"]
    (folder / "own/config.json").write_text(json.dumps(config))
    assert "must name its configuration's class" in refused("upcycle", "own", "moe", TRUST)
