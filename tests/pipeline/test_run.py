"""A recipe's run: every stage is what the library does by hand, killed runs end the same, mistakes are said first."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from checkout import SUPPORT
from datasets import Dataset
from pipeline_inputs import recipe_of, write_backbone, write_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

import ummrm
from ummrm import UmmDistillConfig, UmmDistillTrainer, UmmRewardTrainer, UpcycleConfig
from ummrm.data import DataError, read_pairs
from ummrm.pipeline import Recipe, RecipeError, read_recipe, run_recipe
from ummrm.pipeline.stages import last_checkpoint
from ummrm.trainer.dense import DenseRewardTrainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_backbone(folder / "backbone")
    write_pairs(folder / "pairs.jsonl", broken=["{", '{"chosen": "w1", "rejected": "w1"}'])
    return folder


def recipe(folder, out, **changes):
    return Recipe.from_dict(recipe_of(folder, output=str(out), **changes))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of the shortest recipe, with its control, and what it said."""
    out, said = tmp_path_factory.mktemp("finished") / "out", []
    outcome = run_recipe(recipe(inputs, out, dense=True), log=said.append)
    return out, said, outcome


def weights(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_a_run_is_what_the_library_does_by_hand(finished, inputs, tmp_path):
    out, _, outcome = finished
    pairs = read_pairs(recipe(inputs, out).data)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "backbone")
    common = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    data = {"train_dataset": pairs.train, "processing_class": tokenizer}

    def arguments(name, kind=RewardConfig, **more):
        return kind(str(tmp_path / name), per_device_train_batch_size=8, **common, **more)

    backbone = ummrm.reward_model(inputs / "backbone", tokenizer)
    dense = DenseRewardTrainer(backbone, arguments("dense", num_train_epochs=1, learning_rate=2e-3), **data)
    dense.train()
    load = ummrm.hf.loading.load_checkpoint
    moe = ummrm.upcycle(
        load(inputs / "backbone"),
        UpcycleConfig(assignment="sequence", experts_in="all"),
        new_head=True,
        tokenizer=tokenizer,
    )
    UmmRewardTrainer(moe, arguments("moe", num_train_epochs=4, learning_rate=2e-3), **data).train()
    merged = ummrm.merge(moe)
    distilled = ummrm.merge(moe)
    args = arguments("distilled", UmmDistillConfig, num_train_epochs=1)
    UmmDistillTrainer(distilled, args, teacher=moe, **data).train()
    for name, model in (
        ("dense", dense.model),
        ("mixture", moe),
        ("merged", distilled),
        ("stages/merge/model", merged),
    ):
        saved = load(out / name)
        assert type(saved) is type(model)
        for key, tensor in model.state_dict().items():
            assert torch.equal(saved.state_dict()[key], tensor), (name, key)
    assert set(outcome.metrics) == {"dense", "mixture", "merged", "distilled"}
    held_out = [
        tokenizer(row["prompt"] + row[key] + tokenizer.eos_token)["input_ids"]
        for row in pairs.held_out
        for key in ("chosen", "rejected")
    ]
    with torch.no_grad():
        scores = torch.tensor([distilled.eval()(input_ids=torch.tensor([ids])).logits.item() for ids in held_out])
    right = (scores[::2] > scores[1::2]).double().mean().item()
    assert outcome.metrics["distilled"]["accuracy"] == pytest.approx(right)
    told = json.loads((out / "evaluation.json").read_text())
    assert told["models"]["distilled"]["accuracy"]["share"]["value"] == pytest.approx(right)
    assert all(name in (out / "report.html").read_text() for name in outcome.metrics)
    assert outcome.metrics["distilled"]["pairs"] == len(pairs.held_out)


def test_a_run_says_what_it_left_out_and_made_up_and_leaves_a_stock_model(finished, inputs):
    out, said, _ = finished
    text = "\n".join(said)
    for part in (
        "pairs.jsonl: 40 pairs of 42 rows",
        "pairs.jsonl:41",
        "pairs.jsonl:42",
        "the reward head is fresh (seed 0)",
    ):
        assert part in text, part
    assert [line.split("]")[0] for line in said if line.startswith("[")] == [f"[{i}/5" for i in range(1, 6)]
    stock = AutoModelForSequenceClassification.from_pretrained(out / "merged")
    assert type(stock).__name__ == "LlamaForSequenceClassification" and stock.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(out / "merged").eos_token_id is not None
    assert (out / "merged/README.md").is_file()
    assert not list(out.rglob("checkpoint-*"))
    facts = json.loads((out / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__ and facts["data"]["train"][0]["malformed"] == 1
    again = read_recipe(out / "recipe.yaml")
    assert again.to_dict() == recipe(inputs, out, dense=True).to_dict()


def test_a_run_that_is_done_is_not_done_again_and_changes_are_named(finished, inputs):
    out, _, outcome = finished
    before, said = weights(out / "merged"), []
    assert run_recipe(recipe(inputs, out, dense=True), log=said.append).metrics == outcome.metrics
    assert sum("done before" in line for line in said) == 5 and weights(out / "merged") == before
    with pytest.raises(
        RecipeError, match=r"stage train: arguments.learning_rate was 0.002, is 0.003\..*another `output`"
    ):
        run_recipe(recipe(inputs, out, dense=True, train={"learning_rate": 3e-3}), log=said.append)
    with pytest.raises(RecipeError, match="stage dense: seed was 0, is 1;"):
        run_recipe(recipe(inputs, out, dense=True, seed=1), log=said.append)
    assert weights(out / "merged") == before


def test_settings_of_stages_that_have_not_begun_may_change(inputs, tmp_path, monkeypatch):
    made = {"train": {"max_steps": 1}}

    def cut_off(at):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ummrm.pipeline.stages.merge_mixture", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(inputs, tmp_path / "out", **made), log=lambda _: None)
    outcome = run_recipe(recipe(inputs, tmp_path / "out", **made, distill={"max_steps": 2}), log=lambda _: None)
    assert outcome.stages["distill"]["steps"] == 2
    with pytest.raises(RecipeError, match="stage distill: arguments.max_steps was 2, is 3"):
        run_recipe(recipe(inputs, tmp_path / "out", **made, distill={"max_steps": 3}), log=lambda _: None)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_a_killed_run_ends_with_the_same_bits(inputs, tmp_path, kills):
    """Between and amid steps of both stages that train, and, in the full tier, after a random line of what follows."""
    made = {"train": {"num_train_epochs": kills}, "distill": {"num_train_epochs": kills // 2}}
    said = []
    run_recipe(recipe(inputs, tmp_path / "whole", **made), log=said.append)
    path, draw = tmp_path / "recipe.yaml", random.Random(kills)
    path.write_text(yaml.safe_dump(recipe(inputs, tmp_path / "killed", **made).to_dict()))
    child = [sys.executable, str(SUPPORT / "pipeline_child.py"), str(path)]
    stages = tmp_path / "killed/stages"

    def reached():
        return [last_checkpoint(stages / stage) for stage in ("train", "distill")]

    for kill in range(kills):
        process = subprocess.Popen([*child, "0.3"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, wait = reached(), draw.uniform(0, 0.5)
        trained = kill == kills // 2
        while process.poll() is None and (reached() == before or (trained and not (stages / "distill").exists())):
            time.sleep(0.02)
        time.sleep(wait)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    for _ in range(6 if kills > 2 else 0):
        process = subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(draw.randrange(len(said) // 2, len(said))):
            process.stdout.readline()
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate()
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert "done before" in done.stdout
    for name in ("mixture", "merged"):
        assert weights(tmp_path / "killed" / name) == weights(tmp_path / "whole" / name) != {}


def test_by_token_alpha_is_learned_and_nothing_distilled(inputs, tmp_path):
    made = recipe(
        inputs,
        tmp_path / "out",
        upcycle={"assignment": "token", "num_experts": 2, "num_experts_per_tok": 1},
        merge={"shared_share": 0.25, "max_steps": 3},
    )
    said = []
    outcome = run_recipe(made, log=said.append)
    assert set(outcome.metrics) == {"mixture", "merged"} and outcome.stages["merge"]["steps"] == 3
    assert outcome.stages["train"]["steps"] == 4  # one epoch of 32 pairs: not four times as long
    assert "0.25" in (tmp_path / "out/merged/README.md").read_text()


def test_a_reward_model_keeps_its_head(finished, inputs, tmp_path):
    made = recipe(inputs, tmp_path / "out", model=str(finished[0] / "dense"), train={"max_steps": 1}, distill=False)
    said = []
    run_recipe(made, log=said.append)
    assert not any("fresh" in line for line in said)
    mixture = ummrm.hf.loading.load_checkpoint(tmp_path / "out/mixture")
    assert mixture.config.umm["experts_in"] == "linear"


@pytest.mark.parametrize("assignment", ["sequence", "token"])
def test_adapters_train_in_every_stage_and_are_folded_in(inputs, tmp_path, assignment):
    made = recipe(
        inputs,
        tmp_path / "out",
        dense=True,
        lora={"r": 2, "lora_alpha": 8},
        upcycle={"assignment": assignment},
        merge={"max_steps": 1} if assignment == "token" else {},
    )
    outcome = run_recipe(made, log=lambda _: None)
    load = ummrm.hf.loading.load_checkpoint
    before = load(inputs / "backbone").state_dict()
    moved = {name: load(tmp_path / "out" / name).state_dict() for name in ("dense", "mixture", "merged")}
    for name, after in moved.items():
        assert not any("lora" in key for key in after)
        assert torch.equal(after["model.norm.weight"], before["model.norm.weight"]), name  # has no adapter
    for name in ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"):
        key = f"model.layers.1.{name}"
        assert not torch.equal(moved["dense"][key], before[key]) and not torch.equal(moved["merged"][key], before[key])
        difference = (moved["dense"][key] - before[key]).float()
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
    experts = moved["mixture"]["model.layers.0.mlp.experts.down_proj"]
    assert all(not torch.equal(experts[0], other) for other in experts[1:])
    assert set(outcome.metrics) >= {"dense", "mixture", "merged"}


def test_frozen_parameters_stay_in_every_stage(inputs, tmp_path):
    model = {"path": str(inputs / "backbone"), "frozen": ["model.embed_tokens", "model.layers.0."]}
    run_recipe(recipe(inputs, tmp_path / "out", model=model, dense=True, upcycle={"layers": [1]}), log=lambda _: None)
    load = ummrm.hf.loading.load_checkpoint
    before = load(inputs / "backbone").state_dict()
    for name in ("dense", "mixture", "merged"):
        after = load(tmp_path / "out" / name).state_dict()
        for key, tensor in before.items():
            if key.startswith(tuple(model["frozen"])):
                assert torch.equal(after[key], tensor), (name, key)
        assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    with pytest.raises(RecipeError, match="no parameter of a LlamaForSequenceClassification begins with 'bert'"):
        run_recipe(recipe(inputs, tmp_path / "no", model={**model, "frozen": ["bert"]}), log=lambda _: None)
    assert not (tmp_path / "no").exists()


def test_texts_of_ones_own_are_distilled_on(inputs, tmp_path):
    Dataset.from_list([{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(12)]).to_json(
        tmp_path / "texts.jsonl"
    )
    made = recipe(inputs, tmp_path / "out", train={"max_steps": 1}, distill={"texts": str(tmp_path / "texts.jsonl")})
    outcome = run_recipe(made, log=lambda _: None)
    assert outcome.stages["distill"]["steps"] == 2  # 12 texts in batches of 8


def test_two_processes_make_what_one_makes(inputs, tmp_path):
    made = {"dense": True, "train": {"max_steps": 3}, "distill": {"max_steps": 3}}

    def training(batch):
        return {**recipe_of(inputs)["training"], "per_device_train_batch_size": batch}

    run_recipe(recipe(inputs, tmp_path / "one", training=training(8), **made), log=lambda _: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(inputs, tmp_path / "two", training=training(4), **made).to_dict()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(SUPPORT / "pipeline_child.py"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.count("[1/5]") == 1
        and json.loads((tmp_path / "two/run.json").read_text())["versions"]["processes"] == 2
    )
    for name in ("dense", "mixture", "merged"):
        one, two = (ummrm.hf.loading.load_checkpoint(tmp_path / which / name).state_dict() for which in ("one", "two"))
        for key, tensor in one.items():
            torch.testing.assert_close(
                two[key], tensor, rtol=2e-3, atol=2e-5, msg=lambda text, at=(name, key): f"{at}: {text}"
            )
    found = [json.loads((tmp_path / which / "metrics.json").read_text())["stages"] for which in ("one", "two")]
    for stage in ("dense", "train"):
        for key in (
            "eval_accuracy",
            "eval_margin",
            "eval_mean_reward",
            "eval_std_reward",
            "eval_loss",
            "eval_max_reward",
        ):
            assert found[1][stage][key] == pytest.approx(found[0][stage][key], rel=1e-2, abs=1e-4), (stage, key)


MISTAKES = [
    ({"modle": "x"}, "a recipe has no field `modle`; did you mean `model`"),
    ({"training": {"learning_rat": 1}}, "`training` has no field `learning_rat`; did you mean `learning_rate`"),
    ({"training": {"output_dir": "x"}}, "`training.output_dir` must be left out; a run decides it itself"),
    ({"training": {"seed": 3}}, "`training.seed` must be left out; it is the recipe's own `seed`"),
    ({"upcycle": {"num_experts": 0}}, "upcycle: UpcycleConfig: `num_experts` must be an integer of at least 1, got 0"),
    ({"merge": {"weights": "learnt"}}, "`merge.weights` must be one of mean, learned, got 'learnt'"),
    (
        {"merge": {"max_steps": 3}},
        "`merge` must be without arguments of training where `weights` is mean, got 'max_steps'",
    ),
    ({"seed": -1}, "`seed` must be an integer from 0 to 2^31 - 1, got -1"),
    ({"model": {"path": "x", "head": "no"}}, "`model.head` must be one of auto, fresh, keep, got 'no'"),
    ({"model": "./not/there"}, "there is no folder ./not/there"),
    ({"train": {"lr_scheduler_type": "steep"}}, "`train`: TRL refuses its arguments"),
    ({"data": {"train": "pairs.jsonl", "held_out_shares": 1}}, "`data` has no field `held_out_shares`; did you mean"),
    ({"evaluate": {"probes": ["lenght"]}}, "evaluate: EvaluationConfig: `probes` must be names of length"),
    ({"lora": {"rank": 4}}, "`lora` has no field `rank`"),
    ({"training": {"fsdp": True}}, "`training.fsdp` must be left out in one process"),
    ({"train": {"fsdp": True}}, "`fsdp` must be said of all stages, got none in merge, distill"),
    ({"training": {"fsdp": True}, "lora": {"r": 2}}, "`lora` must be left out with `fsdp`"),
    ({"distill": {"texts": "no.jsonl"}}, "`distill.texts` must name files of texts, and no.jsonl is none"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_mistakes_are_said_before_any_work(inputs, tmp_path, change, message):
    with pytest.raises(RecipeError) as raised:
        run_recipe(recipe(inputs, tmp_path / "out", **change), log=lambda _: None)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_elses_is_left_alone(inputs, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds thesis.txt and no run.json"):
        run_recipe(recipe(inputs, tmp_path), log=lambda _: None)
    with pytest.raises(RecipeError, match="must be a folder, and .* is a file"):
        run_recipe(recipe(inputs, tmp_path / "thesis.txt"), log=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_strict_data_is_an_error(inputs, tmp_path):
    data = {"train": str(inputs / "pairs.jsonl"), "held_out_share": 0.2, "strict": True}
    with pytest.raises(DataError, match="2 rows make no pair, and `strict` is set"):
        run_recipe(recipe(inputs, tmp_path / "out", data=data), log=lambda _: None)
