"""`ummrm run` of a recipe that can't be run: one line that names the place, exit status 2, nothing written."""

import json

import pytest
import yaml
from pipeline_inputs import write_backbone, write_pairs

PLAIN = {"model": "backbone", "data": "pairs.jsonl", "output": "out"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl", broken=["{"])
    (tmp_path / "file").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "can't be read as YAML"),
        ("seed: 2001-99-99\n", "can't be read as YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [true]\n", "can't be read as YAML"),
        (b"\xff\xfe\x00", "can't be read as YAML"),
        ("[" * 5000, "can't be read as YAML"),
        ("? [a]\n: b\n", "can't be read as YAML"),
        ("train: {}\nseed: 1\ntrain: {}\n", "the key 'train' is given twice, again in line 3"),
        ("- model\n", "a recipe must be a mapping of model, data, output"),
        ("", "a recipe must be a mapping"),
        ("3: 4\n", "a recipe has no field `3`"),
        ("#" * 100_000, "must be a recipe of at most 64 kB"),
    ],
)
def test_a_file_that_is_no_recipe(text, message, folder, refused):
    (folder / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused("run", "recipe.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": 1}, "no field `modle`; did you mean `model`?"),
        ({"model": 3}, "`model.path` must be a folder or hub name, got 3"),
        ({"model": {"path": "backbone", "dtype": "float8"}}, "`model.dtype` must be one of float32, bfloat16, float16"),
        ({"model": {"path": "backbone", "frozen": 3}}, "`model.frozen` must be"),
        (
            {"model": {"path": "backbone", "trust_remote_code": "yes"}},
            "`model.trust_remote_code` must be true or false",
        ),
        ({"model": {"dtype": "float32"}}, "`model.path` must be a folder or hub name"),
        ({"model": "./nowhere"}, "there is no folder ./nowhere"),
        ({"model": "file"}, "`model.path`"),
        ({"data": 3}, "got 3"),
        ({"data": "nowhere.jsonl"}, "'nowhere.jsonl' is not there"),
        ({"data": {"train": []}}, "`train` must be at least one source"),
        ({"data": {"train": [3]}}, "got 3"),
        ({"data": {"path": "pairs.jsonl", "turns": "Human"}}, "`turns` must be two different names"),
        ({"output": 3}, "`output` must be a folder, got 3"),
        ({"output": "file"}, "`output` must be a folder, and file is a file"),
        ({"output": "file/below"}, "`output`"),
        ({"seed": "one"}, "`seed` must be an integer"),
        ({"training": 3}, "`training` must be a mapping of arguments, got 3"),
        ({"training": {"learning_rate": "fast"}}, "`training.learning_rate` must be a number, got 'fast'"),
        ({"dense": {"max_steps": "1e2"}}, "`dense.max_steps` must be an integer, got '1e2'"),
        ({"training": {"learning_rat": 1}}, "did you mean `learning_rate`"),
        ({"upcycle": {"layers": "x"}}, "`layers` must be"),
        ({"lora": {"r": "x"}}, "`lora.r` must be an integer, got 'x'"),
        ({"merge": {"weights": "max"}}, "`merge.weights` must be one of mean, learned"),
        ({"distill": {"texts": 3}}, "`distill.texts` must be"),
        ({"distill": {"texts": ["nowhere.jsonl"]}}, "`distill.texts` must name files"),
        ({"evaluate": {"probes": ["lenght"]}}, "`probes` must be names of"),
        ({"evaluate": {"probes": 3}}, "`probes` must be"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_recipe(change, message, folder, refused):
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**PLAIN, **change}))
    line = refused("run", "recipe.yaml")
    assert message in line and len(line) < 900, line
    assert message in refused("run", "recipe.yaml", "--dry-run")


def test_a_recipe_that_is_not_there_and_rows_that_make_no_pair(folder, refused, command):
    assert "there" in refused("run", "nowhere.yaml")
    assert "must be a YAML file" in refused("run", "backbone")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(PLAIN))
    assert "1 rows make no pair, and `strict` is set" in refused("run", "recipe.yaml", "--strict")
    done = command("run", "recipe.yaml", "--dry-run")
    assert done.status == 0 and "pairs.jsonl:41" in done.err and not (folder / "out").exists()


def test_a_number_without_a_point_is_a_number(folder):
    """PyYAML reads `1e-5` as text, and torch would find out in the middle of the work."""
    from ummrm.pipeline import read_recipe
    from ummrm.pipeline.arguments import stage_arguments

    more = "dense: &same {learning_rate: 1e-5, max_steps: 3}\ntraining: {<<: *same}\n"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(PLAIN) + more)
    arguments = stage_arguments(read_recipe("recipe.yaml"), "train", folder / "stage")
    assert arguments.learning_rate == 1e-5 and arguments.max_steps == 3
