"""The recipes for models of the hub: they read, their columns are those of the data sets, and the documentation's table
of what they take is what the plan computes.
"""

import pytest
import torch
from checkout import ROOT
from recipe_table import configuration, devices, plans, recipes, table
from transformers import AutoModelForCausalLM

from ummrm.data.pairs import pair_of
from ummrm.data.rows import Place, RowProblem
from ummrm.pipeline import read_recipe
from ummrm.pipeline.plan import shapes

# Numbers of parameters as the hub states them of the language models; of Pythia its model cards leave embeddings out.
STATED = {
    "EleutherAI/pythia-410m": 302_311_424 + 2 * 50304 * 1024,
    "EleutherAI/pythia-1.4b": 1_208_602_624 + 2 * 50304 * 2048,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
}
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Why?"), ("assistant", "So."), ("assistant", "No.")))
# A row of each data set, with all of its columns.
ROWS = {
    "Anthropic/hh-rlhf": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "openai/webgpt_comparisons": {
        "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
        **{f"quotes_{i}": {"title": ["a"], "extract": ["b"]} for i in range(2)},
        **{"answer_0": "No.", "answer_1": "So.", "score_0": -0.5, "score_1": 0.5},
        **{f"tokens_{i}": {"prefix": [1], "completion": [2]} for i in range(2)},
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "Why?",
        "prompt_id": "1",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "messages": [USER, GOOD],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
}


def test_there_are_recipes_for_every_backbone_and_data_set():
    read = [read_recipe(path) for path in recipes()]
    assert 5 <= len(read) <= 8
    assert {one.model.path for one in read} == set(STATED)
    assert {source.path for one in read for source in one.data.train} == set(ROWS)


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_a_recipe_fits_on_a_screen_and_says_how_it_is_started(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 140
    assert lines[0].startswith("# ") and lines[1].startswith("#   ")
    recipe = read_recipe(path)
    launched = "accelerate launch --multi_gpu --num_processes"
    assert lines[1].endswith(f"ummrm run recipes/{path.name}") and (launched in lines[1]) == (devices(path) > 1)
    assert bool(recipe.training.get("fsdp")) == (devices(path) > 1)
    config = recipe.upcycle_config(fresh=True)
    if "paper" in path.stem:
        found = (config.num_experts + config.num_shared_experts, config.num_experts_per_tok + config.num_shared_experts)
        assert (*found, config.gate) == (8, 6, "shared_complement")
        assert recipe.merge_weights == "learned" and recipe.merge_config().shared_share == 0.5
    else:
        assert config.by_sequence and config.experts_in == "all" and recipe.merge_weights == "mean"
        assert recipe.distill is not None


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_a_recipe_finds_its_pairs_in_the_columns_of_its_data(path):
    data = read_recipe(path).data
    for source in (*data.train, *data.held_out):
        row = ROWS[source.path]
        pair = pair_of(row, source, Place(source.path, 1, "row"))
        assert str(pair.chosen).count("So.") == str(pair.rejected).count("No.") == 1
        if pair.is_conversation:
            assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [GOOD], [BAD])
        if source.scores:
            with pytest.raises(RowProblem, match="both answers have the score 0"):
                pair_of({**row, "score_0": 0.0, "score_1": 0.0}, source, Place(source.path, 1, "row"))


@pytest.mark.parametrize("model", STATED)
def test_the_kept_configurations_are_of_models_of_the_stated_sizes(model):
    config = configuration(model)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    backbone.tie_weights()
    assert sum(p.numel() for p in backbone.parameters()) == STATED[model]
    dense = shapes(config, read_recipe(recipes()[0]).upcycle_config(fresh=True))["dense"]
    own_head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert dense.parameters == STATED[model] - own_head + config.hidden_size


def test_the_documentations_table_is_what_the_plan_computes():
    assert table() in (ROOT / "docs/recipes.md").read_text(), "python tests/support/recipe_table.py makes it"
    for path in recipes():
        for one in plans(path):
            assert one.steps >= 1 and one.memory < 80e9, "a recipe is for devices of 80 GB"
