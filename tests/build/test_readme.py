"""The code of README.md and of docs/ runs as it stands, block after block, and links and commands exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from checkout import ROOT
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification
from trl_inputs import make_tokenizer
from typer.testing import CliRunner

import ummrm
from ummrm.cli import app
from ummrm.pipeline import Recipe, read_recipe
from ummrm.pipeline.arguments import stage_arguments

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# what a page asks its reader to bring
GIVEN = {"docs/training.md": lambda: {"dense": tiny_model("llama"), "tokenizer": make_tokenizer()}}
RUN_HERE = {"README.md": 2, "docs/quickstart.md": 6, "docs/training.md": 11}  # blocks of code


def text(page):
    return (ROOT / page).read_text()


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.M | re.S)


def run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace = {"__name__": "page", **GIVEN.get(page, dict)()}
    for block in blocks(page):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_every_page_with_code_is_run():
    assert {page: len(blocks(page)) for page in RUN_HERE} == RUN_HERE
    others = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    for page in set(PAGES) - set(RUN_HERE):
        assert not blocks(page) or any(f'exec(compile(code, "{page}"' in test for test in others), page


def test_the_readmes_code_makes_a_stock_model_of_a_model_and_pairs(tmp_path, monkeypatch):
    tiny_model("llama", "CausalLM").save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    rows = [{"prompt": f"w{i}", "chosen": " w1 w2", "rejected": f" w3 w{i}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    namespace = run("README.md", tmp_path, monkeypatch)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged-rm")
    assert type(merged) is type(tiny_model("llama"))
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in namespace["moe"].parameters())


def section(page, title):
    return text(page).split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def commands_of(part):
    """The command lines of a part of a page, split as a shell splits them."""
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", part, re.M | re.S)).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_five_commands_lead_from_a_clean_machine_to_an_evaluated_model(tmp_path, monkeypatch):
    """Two install; the other three are run as they stand."""
    install, own = (commands_of(section("README.md", title)) for title in ("Install", "Your own pairs"))
    assert [command[:2] for command in install] == [["pip", "install"]] * 2 and len(own) == 3
    assert install == [["pip", "install", "torch"], ["pip", "install", ".[run]"]]
    tiny_model("llama", "CausalLM").save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    for name, first in (("pairs", 0), ("other-pairs", 24)):
        rows = [{"prompt": f"w{i}", "chosen": " w1 w2", "rejected": f" w3 w{i}"} for i in range(first, first + 24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    for command in own:
        assert command[0] == "ummrm"
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
        assert Path("my-rm").exists() != ("--dry-run" in command)
    assert type(AutoModelForSequenceClassification.from_pretrained("my-rm/merged")) is type(tiny_model("llama"))
    assert set(json.loads(Path("my-rm/metrics.json").read_text())["models"]) >= {"dense", "distilled"}
    for folder, models in (("my-rm", {"dense", "distilled"}), ("other", {"merged", "dense"})):
        told = json.loads(Path(folder, "evaluation.json").read_text())["models"]
        assert set(told) >= models and all(name in Path(folder, "report.html").read_text() for name in models)
        assert all(0 <= told[name]["accuracy"]["share"]["value"] <= 1 for name in models)
    assert told["merged"]["accuracy"]["share"]["count"] == 24


def test_the_recipes_of_the_documentation_are_some(tmp_path):
    whole, data, stages = (yaml.safe_load(block) for block in blocks("docs/recipes.md", "yaml"))
    recipe = Recipe.from_dict({**whole, **data, **stages})
    assert recipe.data.train[1].weight == 0.5 and recipe.texts() == ("prompts-with-answers.jsonl",)
    for stage in ("dense", "train", "distill"):
        stage_arguments(recipe, stage, tmp_path)
    default = Recipe.from_dict(whole).upcycle_config(fresh=True)
    assert default == recipe.upcycle_config(fresh=True) and Recipe.from_dict(whole).longer(default) == 4
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert read_recipe(path).output, path


def test_the_quickstarts_code_runs(tmp_path, monkeypatch):
    namespace = run("docs/quickstart.md", tmp_path, monkeypatch)
    assert type(namespace["merged"]).__name__ == "LlamaForSequenceClassification"
    assert (tmp_path / "merged-rm" / "model.safetensors").is_file()
    network, dense, x = namespace["network"], namespace["dense_network"], namespace["chosen"]
    assert type(dense[1].ffn) is torch.nn.Sequential and namespace["members"].shape == (16, 4)
    merged = ummrm.prepare_merge(network)
    torch.testing.assert_close(dense(x), merged(x), rtol=1e-5, atol=1e-6)


def test_the_training_pages_code_runs(tmp_path, monkeypatch):
    namespace = run("docs/training.md", tmp_path, monkeypatch)
    assert (tmp_path / "merged-rm" / "README.md").is_file() and namespace["loss"].item() > 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged-rm")
    raw, normalized = namespace["raw"], namespace["normalized"]
    kept = loaded.config.reward_normalization
    torch.testing.assert_close(normalized, (raw - kept["mean"]) / kept["std"])
    assert type(namespace["dense_again"]) is type(loaded) is type(namespace["student"]) is type(namespace["fresh"])
    assert (tmp_path / "distilled-rm" / "final" / "README.md").is_file() and len(namespace["rewards"]) == 2
    assert {"eval_easy_accuracy", "eval_hard_accuracy"} <= namespace["final"].keys()


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text(page)) if not link.startswith("http")]
    assert links or page != "README.md"
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


TARGETS = sorted({target for page in PAGES for target in re.findall(r"(?:`|^)make ([a-z-]+)", text(page), re.M)})


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    makefile = (ROOT / "Makefile").read_text()
    studies = re.search(r"^STUDIES := \$\(addprefix lab-,(.+?)\)", makefile, re.M | re.S)[1].replace("\\", " ").split()
    assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.M) or target.removeprefix("lab-") in studies
