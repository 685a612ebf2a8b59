"""The readers of recipes and studies: YAML that is none, misspelt names, and random input; each error is one line."""

import copy
import functools
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import tiny_study

from lab import StudyConfig, load_study
from lab.demo import RecipeConfig, load_recipe

LOADERS = {"recipe": load_recipe, "study": load_study}
LETTERS = list(zip("abcdefghijkl", "bcdefghijklm", strict=True))
BOMB = "name:\n- &a [x]\n" + "".join(f"- &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in LETTERS)
MERGES = "name:\n- &a {x: 1}\n" + "".join(f"- &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in LETTERS)
NO_CONFIGURATIONS = {
    "syntax": (b"a: [1", r"is not valid YAML: .*at line 1, column"),
    "alias bomb": (BOMB.encode(), "with its aliases written out"),
    "merge bomb": (MERGES.encode(), "with its aliases written out"),
    "itself": (b"a: &a [*a]", "must not contain itself: the alias at line 1"),
    "a key twice": (b"name: x\nmodel: {a: 1, a: 2}", "must have each key once, got 'a' again at line 2"),
    "large": (b"# " + b"x" * 2**19, "must be at most 262144 bytes, got 524290"),
    "deep": (b"[" * 900, "nested too deeply"),
    "bytes": (b"\xff\xfe\xff", "is not valid YAML"),
    "odd numbers": (b"a: !!float ''", "is not valid YAML"),
    "binary": (b"name: !!binary aGk=", "must be plain data"),
    "a list": (b"- 1", "must be a mapping of fields, got"),
    "nothing": (b"", "must be a mapping of fields, got None"),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("data", "message"), NO_CONFIGURATIONS.values(), ids=NO_CONFIGURATIONS)
def test_what_is_no_configuration_is_refused_in_one_line_that_names_the_file(kind, data, message, tmp_path):
    path = tmp_path / "it.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        LOADERS[kind](path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_numbers_are_read_as_one_writes_them(tmp_path):
    data = load_recipe("demo").to_dict()
    data["dense"]["learning_rate"] = 0
    text = yaml.safe_dump(data).replace("learning_rate: 0\n", "learning_rate: 1e-3\n")
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(tmp_path / "mine.yaml").dense.learning_rate == 1e-3
    (tmp_path / "mine.yaml").write_text(text.replace("weight_decay: 0.01", "weight_decay: 1"))
    whole = load_recipe(tmp_path / "mine.yaml").dense.weight_decay
    assert whole == 1 and isinstance(whole, float)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"options": {"hidden_sizee": 8}}, r"fields of LlamaConfig, got hidden_sizee \(did you mean hidden_size"),
        ({"model_type": "lama"}, r"one that transformers knows, got 'lama' \(did you mean llama"),
        ({"options": {"hidden_size": "64"}}, "must suit a llama, and were refused: .*hidden_size.*expected int"),
        (
            {"options": {"num_attention_heads": 7}},
            "must suit a llama, .*not a multiple of the number of attention",
        ),
        ({"model_type": None, "folder": "x", "options": {"a": 1}}, "must be left out without `model_type`"),
    ],
)
def test_options_that_a_model_does_not_know_are_refused_before_any_work(model, message):
    for cls, data in ((RecipeConfig, load_recipe("demo").to_dict()), (StudyConfig, tiny_study().to_dict())):
        data["model"] |= model
        with pytest.raises(ValueError, match=message):
            cls.from_dict(data)


def test_options_by_older_names_are_taken_in_and_left_as_they_are():
    data = tiny_study().to_dict()
    data["model"]["options"] |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5.0}
    given = copy.deepcopy(data["model"]["options"])
    assert StudyConfig.from_dict(data).model.options == given


def test_all_mistakes_are_said_at_once_with_names_that_are_near():
    data = load_recipe("demo").to_dict()
    data["dense"] = {"stepz": 3, "batch_size": 1.5}
    data["task"]["kind"] = "image"
    with pytest.raises(ValueError, match="got 1.5.*") as caught:
        RecipeConfig.from_dict(data)
    said = str(caught.value)
    assert "recipe.dense has no field stepz (did you mean steps?); it has steps, batch_size" in said
    assert "recipe.task.kind must be one of synthetic, text, got 'image'." in said and "\n" not in said


# ---- random input ------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from([10**30, -1, 0, "1e-3"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = st.text(max_size=6) | st.sampled_from(["kind", "steps", "task", "model_type", "layers", "__class__", "self"])


def changed(data, draw):
    """Plain data with one value somewhere replaced, added or left out."""
    data = copy.deepcopy(data)
    at = data
    while inner := [key for key, value in at.items() if isinstance(value, dict) and value]:
        if draw(st.booleans()):
            break
        at = at[draw(st.sampled_from(inner))]
    key = draw(st.sampled_from(list(at)) | KEYS)
    if draw(st.integers(0, 4)) == 0:
        at.pop(key, None)
    else:
        at[key] = draw(VALUES)
    return data


def read_or_refused(read):
    try:
        read()
    except ValueError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 3000, said
    except RecursionError as error:
        raise AssertionError("no configuration of a user's is that deep") from error


def random_data(data):
    name = data.draw(st.sampled_from(["recipe", "study"]))
    cls, plain = {"recipe": (RecipeConfig, RECIPE), "study": (StudyConfig, STUDY)}[name]
    given = changed(plain, data.draw)
    if data.draw(st.booleans()):
        given = changed(given, data.draw)
    read_or_refused(lambda: cls.from_dict(given))


def random_files(folder, data):
    signs = ["a: ", "- ", "&a ", "*a", "<<: ", "{", "}", "[", "]", "\n", "  ", "!!int ", "!!set ", "'", '"', ": ", "0x"]
    words = ["2001-13-45", "1:99", "1e-3", ".inf", "extends: ", "cpu", "name: x\n", "%TAG", "|", ">", "\\x00", "~"]
    pieces = st.sampled_from(signs + words)
    text = data.draw(st.lists(pieces, max_size=14).map("".join))
    content = data.draw(st.just(text.encode()) | st.binary(max_size=40))
    (folder / "it.yaml").write_bytes(content)
    for load in LOADERS.values():
        read_or_refused(functools.partial(load, folder / "it.yaml"))


RECIPE, STUDY = load_recipe("demo").to_dict(), json.loads(json.dumps(tiny_study().to_dict()))


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.full)])
def test_random_configurations_are_read_or_refused_in_one_line(count, tmp_path):
    limits = settings(max_examples=count, deadline=None, derandomize=True, database=None)
    limits(given(st.data())(random_data))()
    limits(given(st.data())(lambda data: random_files(tmp_path, data)))()
