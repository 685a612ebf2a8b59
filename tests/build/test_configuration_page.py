"""docs/configuration.md is what the dataclasses and their docstrings give, and what it says of arguments holds."""

import dataclasses
import importlib.util

import pytest
from checkout import ROOT

from ummrm import MergeConfig
from ummrm.pipeline import Recipe, RecipeError, adapters, arguments


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("configuration_reference", ROOT / "tools/configuration_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_gives(tool):
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == tool.page(), "run python tools/configuration_reference.py"


def test_a_field_without_a_meaning_a_type_or_a_place_is_an_error(tool):
    @dataclasses.dataclass
    class Silent:
        """Attributes:
        told: has a meaning.
        """

        told: "int" = 0
        silent: "int" = 0

    @dataclasses.dataclass
    class Gone:
        """What is left of it.

        Attributes:
            told: has a meaning.
            gone: has no field.
        """

        told: "int" = 0

    @dataclasses.dataclass
    class Strange:
        """What has a type of its own.

        Attributes:
            told: has a meaning
                in two lines.
        """

        told: "bytearray" = None

    for cls, name in ((Silent, "silent"), (Gone, "gone")):
        with pytest.raises(ValueError, match=f"{cls.__name__}: .* see {name}"):
            tool.own_fields(cls)
    assert tool.meanings(Strange) == {"told": "has a meaning in two lines."}
    with pytest.raises(ValueError, match="Strange.told: TYPES must have words for 'bytearray'"):
        tool.field_table(Strange)


def stage_rows(tool):
    rows = [line.strip("| ").split(" | ") for line in tool.stage_table().splitlines()[2:]]
    return {block.strip("`"): (passes, beside) for block, passes, beside in rows}


def test_what_is_said_to_pass_through_reaches_the_stages(tool, tmp_path):
    rows = stage_rows(tool)
    learned = {"merge": {"weights": "learned"}}
    assert {block for block, (passes, _) in rows.items() if passes.startswith("yes")} == {"training", *arguments.KINDS}
    for block in arguments.KINDS:
        made = tool.recipe(**{**learned, block: {**learned.get(block, {}), "warmup_steps": 17}})
        given = arguments.stage_arguments(made, block, tmp_path)
        assert given.warmup_steps == 17 and type(given).__name__ in rows[block][0]
        for name, value in arguments.DEFAULTS.items():
            assert getattr(given, name) == ([] if name == "report_to" else value), (block, name)  # TRL's word for none
    assert {block for block, (passes, _) in rows.items() if passes.startswith("no")} == {"lora", "upcycle", "evaluate"}
    for block in ("upcycle", "evaluate"):
        with pytest.raises(RecipeError, match="warmup_steps"):
            tool.recipe(**{block: {"warmup_steps": 17}})
    with pytest.raises(RecipeError, match="no field `warmup_steps`"):
        adapters.check_lora({"warmup_steps": 17})


def test_a_merge_and_a_distillation_have_lengths_and_rates_of_their_own(tool, tmp_path):
    said = {"num_train_epochs": 3.0, "learning_rate": 7e-3, "center_rewards_coefficient": 0.5, "warmup_steps": 17}
    assert set(said) < {*arguments.REWARD_MODELS_ALONE, "warmup_steps"}
    made = tool.recipe(training=said, merge={"weights": "learned"})
    for stage in arguments.KINDS:
        given = arguments.stage_arguments(made, stage, tmp_path)
        heard = {name for name, value in said.items() if getattr(given, name) == value}
        assert heard == (set(said) if stage in ("dense", "train") else {"warmup_steps"}), stage


def test_what_stands_beside_the_arguments_is_all_that_the_merge_takes():
    assert set(arguments.BESIDE["merge"]) == {"weights", *(field.name for field in dataclasses.fields(MergeConfig))}


@pytest.mark.parametrize("name", arguments.OURS)
def test_what_a_run_decides_is_refused(name, tmp_path):
    made = Recipe.from_dict({"model": "m", "data": "d.jsonl", "output": "o", "train": {name: 1}})
    with pytest.raises(RecipeError, match=f"`train.{name}` must be left out"):
        arguments.stage_arguments(made, "train", tmp_path)
