"""Studies on checkpoints and data by name, end to end and offline: what is loaded, made, optimised and refused."""

import math
import re
import sys

import datasets
import pytest
import torch
import yaml
from checkout import ROOT
from tiny_checkpoints import byte_tokenizer, data_on, pairs_of, save_checkpoints, save_data, study_on
from tiny_models import tiny_model
from tiny_study import tiny_study
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl_inputs import make_tokenizer

from lab import CheckpointTaskConfig, StudyConfig, load_study, run_study, write_report
from lab.arms import Arms
from lab.online import OnlineConfig, run_online
from lab.ratings.task import RatingsTaskConfig
from lab.store import COLUMNS, read_table
from lab.units import Unit, UnitRunner

TABLES = ("runs", "curves", "experts")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoints(folder)
    save_data(folder)
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield folder
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = study_on(root)
    run_study(study, folder, progress=False)
    return study, folder


def tables(folder):
    return {name: (folder / f"{name}.csv").read_bytes() for name in TABLES}


def test_every_arm_and_optimiser_is_a_row_of_the_same_tables(finished):
    study, folder = finished
    rows = {(row["arm"], row["optimiser"]): row for row in read_table(folder, "runs")}
    assert set(rows) == {(arm, o) for arm in study.arms for o in study.optimisers(arm)} and len(rows) == 9
    for name in TABLES:
        assert (folder / f"{name}.csv").read_text().partition("\n")[0] == ",".join(COLUMNS[name])
    for (_, optimiser), row in rows.items():
        assert all(math.isfinite(row[k]) for k in ("gold_end", "proxy_end", "kl_end", "shortcut_end"))
        assert optimiser != "best_of_n" or 0 <= row["accuracy"] <= 1
    merged, dense, moe = (rows[arm, "best_of_n"] for arm in ("merged", "dense", "moe"))
    assert merged["parameters"] == dense["parameters"] < moe["parameters"]


def test_each_optimiser_leaves_the_start_at_an_exact_kl(finished):
    study, folder = finished
    curves = read_table(folder, "curves")
    for optimiser in ("ppo", "rloo", "grpo"):
        path = [r for r in curves if (r["arm"], r["optimiser"]) == ("dense", optimiser)]
        assert [row["step"] for row in path] == [0, 1, 2]
        assert path[0]["kl"] == path[0]["kl_estimate"] == 0 < min(path[1]["kl"], path[2]["kl"])
        assert all(row["entropy"] > 0 and 1 <= row["length"] <= 6 for row in path)
        assert all(row["shortcut"] == row["length"] for row in path), "the shortcut is the answer's length"


def test_the_report_names_trls_optimisers(finished, tmp_path):
    _, folder = finished
    for source in [*folder.glob("*.csv"), folder / "study.json"]:
        (tmp_path / source.name).write_text(source.read_text())
    (tmp_path / "experts.csv").write_text(",".join(COLUMNS["experts"]) + "\n")  # plots of which other tests speak
    names = {path.name for path in write_report(tmp_path)}
    assert {"report.html", "best_of_n.png", "ppo.png", "rloo.png", "grpo.png"} <= names
    assert "gold at the end of RLOO" in (tmp_path / "report.html").read_text()


def test_a_lost_unit_is_run_again_to_the_same_tables(finished, root, tmp_path):
    """What a kill leaves: units that are done, and for the rest at most a stage; no random state is handed on."""
    study, folder = finished
    (tmp_path / "units").mkdir()
    lost = {"alpaca-0-dense-ppo", "alpaca-0-dense-rloo"}
    kept = [path for path in (folder / "units").glob("*.json") if path.stem not in lost]
    assert len(kept) == 7
    for path in kept:
        (tmp_path / "units" / path.name).write_bytes(path.read_bytes())
    run_study(study, tmp_path, progress=False)
    assert tables(tmp_path) == tables(folder)


@pytest.fixture(scope="module")
def runner(root):
    return UnitRunner(Arms(study_on(root), "alpaca", 0))


def test_pairs_are_the_policys_own_answers_labelled_by_gold(runner, root):
    task, config = runner.task, runner.study.regimes["alpaca"].task
    count = len(task.train)
    assert 4 < len(task.test) <= 8 and 12 < count <= 16, "equal answers make no pair"
    assert task.train.label_noise == round(count * 0.25) / count
    gold = task.gold
    assert bool((gold(task.test.chosen) > gold(task.test.rejected)).all())
    wrong = (gold(task.train.chosen) < gold(task.train.rejected)).double().mean().item()
    assert wrong == task.train.label_noise
    lead = task.shortcut_of(task.test.chosen) - task.shortcut_of(task.test.rejected)
    assert task.test.shortcut_share == (lead > 0).double().mean().item() and len(task.shifted) == (lead < 0).sum() > 0
    assert bool((task.shortcut_of(task.shifted.chosen) < task.shortcut_of(task.shifted.rejected)).all())
    assert len(task.policy.shortcut.unique()) > 3, "answers of several lengths"
    none = task.shifted.select(slice(0, 0))
    assert math.isnan(runner._accuracy(None, none)), "no pair of a kind is a missing value"
    assert int(task.train.chosen.lengths.max()) <= config.max_prompt_tokens + config.max_answer_tokens
    prompts = {
        tuple(row[:n]) for row, n in zip(task.prompts.tokens.tolist(), task.prompts.lengths.tolist(), strict=True)
    }
    assert len(prompts) == 6
    pairs = {tuple(row[: task.prompts.tokens.shape[1]]) for row in task.train.chosen.tokens.tolist()}
    assert not any(pair[: len(prompt)] == prompt for pair in pairs for prompt in prompts), "prompts of their own"


def test_gold_is_what_the_gold_model_says_of_the_text(runner, root):
    samples = runner.task.policy
    tokenizer = AutoTokenizer.from_pretrained(root / "gold")
    model = AutoModelForSequenceClassification.from_pretrained(root / "gold").eval()
    for i in (0, 9, 23):
        ids = samples.sequences.tokens[i, : samples.sequences.lengths[i]].tolist()
        assert ids[-1] == 2, "every answer ends"
        length = int(samples.shortcut.flatten()[i])
        instruction = tokenizer.decode(ids[1 : len(ids) - length - 1])  # between the template's w1 and w2
        answer = tokenizer.decode(ids[len(ids) - length :], skip_special_tokens=True)
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        read = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
        with torch.no_grad():
            expected = model(input_ids=read["input_ids"]).logits.item()
        assert samples.gold.flatten()[i].item() == pytest.approx(expected, abs=1e-5)


def test_the_dense_model_starts_from_the_checkpoint_and_pads_as_the_task(runner, root):
    model = runner.arms.setting.dense(0)
    body = runner.policy().network.base_model.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in model.base_model.state_dict().items())
    assert model.config.pad_token_id == runner.task.pad_token_id and model.config.num_labels == 1


def test_what_was_sampled_is_kept_for_the_resumed_study(root, tmp_path, monkeypatch):
    first = Arms(study_on(root), "alpaca", 0, tmp_path).task
    monkeypatch.setattr("lab.checkpoint_task.sample", None)
    again = Arms(study_on(root), "alpaca", 0, tmp_path).task
    assert torch.equal(first.policy.gold, again.policy.gold)
    assert torch.equal(first.train.chosen.tokens, again.train.chosen.tokens)


def test_pairs_of_a_data_set_keep_their_labels(root):
    study = study_on(root, {"pairs": pairs_of(root), "label_noise": 0.0, "template": None})
    arms = Arms(study, "alpaca", 0)
    assert len(arms.task.train) == 16 and len(arms.task.test) == 8
    tokenizer = make_tokenizer()
    text = tokenizer.decode(arms.task.train.chosen.tokens[0, : arms.task.train.chosen.lengths[0]].tolist())
    rows = {r["chosen"]: r for r in datasets.load_dataset("json", data_files=pairs_of(root)["data_files"])["train"]}
    row = next(r for chosen, r in rows.items() if text.endswith(f"<assistant> {chosen} <eos>"))
    assert text == f"<user> {row['prompt']} <assistant> {row['chosen']} <eos>", "the policy's chat template"


@pytest.mark.parametrize("optimiser", ["rloo", pytest.param("grpo", marks=pytest.mark.full)])
def test_trl_maximises_the_reward_of_whole_answers_at_the_exact_kl(optimiser, runner):
    """A reward that is known: the share of one word. What TRL hands over are the task's prompts with ended answers."""
    policy, task, setting = runner.policy(), runner.task, runner.arms.setting
    before = {name: p.clone() for name, p in policy.network.named_parameters()}
    seen = []

    def share(sequences):
        seen.append(sequences)
        answers = sequences.lengths - task.shortcut_of(sequences).long()  # raises unless each begins with a prompt
        position = torch.arange(sequences.tokens.shape[1])
        inside = (position >= answers[:, None]) & (position < sequences.lengths[:, None])
        return ((sequences.tokens == 20) & inside).sum(1) / task.shortcut_of(sequences)

    records = run_online(
        optimiser,
        policy,
        task.prompts,
        setting.prompt_texts(),
        share,
        task.gold,
        OnlineConfig(
            steps=8,
            batch_size=32,
            generations=8,
            forward_batch_size=32,
            learning_rate=1e-2,
            kl_coefficient=0.01,
            measure_every=5,
            measure_samples=256,
        ),
        0,
        setting.prompt_template,
    )
    assert [record.step for record in records] == [0, 5, 8]
    assert records[-1].reward > records[0].reward + 0.2
    start, *_, end = records
    assert start.kl == 0 and end.kl == pytest.approx(end.kl_estimate, rel=0.3), "two estimates of one expectation"
    assert all(torch.equal(p, before[name]) for name, p in policy.network.named_parameters()), "the start stays"
    for sequences in seen:
        last = sequences.tokens.gather(1, sequences.lengths[:, None] - 1)
        assert bool((last == task.end_token_id).all())
        assert int((sequences.tokens == task.end_token_id).sum(1).max()) == 1
        assert int(task.shortcut_of(sequences).max()) <= policy.max_answer_tokens


@pytest.mark.full
def test_in_bf16_every_optimiser_runs_over_the_families_of_qwen(root, tmp_path):
    """Their tokenizers are byte pairs, read by classes of their own."""
    save_checkpoints(tmp_path, ("qwen2", "qwen3"), byte_tokenizer(), vocab_size=259)
    save_data(tmp_path)
    task = {"dtype": "bfloat16", "template": None, "max_prompt_tokens": 40, "max_answer_tokens": 8}
    study = study_on(tmp_path, task)
    arms = Arms(study, "alpaca", 0)
    runner = UnitRunner(arms)
    for optimiser in ("best_of_n", "ppo", "rloo", "grpo"):
        found = runner.measure(Unit("alpaca", 0, "merged", optimiser))
        assert all(math.isfinite(row["gold"]) for row in found["curve"]) and len(found["curve"]) >= 3
    assert {p.dtype for p in runner.model("moe").models[0].parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


# ---- mistakes --------------------------------------------------------------------------------------------------


def without_template(root, name):
    """A copy of a checkpoint whose tokenizer has neither chat template nor padding."""
    target = root / f"{name}_bare"
    kind = "ForSequenceClassification" if name == "gold" else "ForCausalLM"
    tiny_model("llama" if name == "gold" else "gpt_neox", kind).save_pretrained(target)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(target)
    return str(target)


MISTAKES = {
    "no policy": (lambda r: {"policy": str(r / "nowhere")}, "`task.policy` must be a folder or .* hub name.*nowhere"),
    "no gold": (lambda r: {"gold": {"name": str(r / "nowhere")}}, "`task.gold.name` must be a folder or .*nowhere"),
    "policy as gold": (lambda r: {"gold": {"name": str(r / "policy")}}, "must be a reward model.*lacks score"),
    "two outputs": (lambda r: {"gold": {"name": str(r / "two_heads")}}, "with one output.*has several outputs"),
    "no data": (
        lambda r: {"prompts": {"name": "json", "data_files": str(r / "none.json")}},
        "`task.prompts` must be a data set that this machine can reach.*none.json",
    ),
    "no column": (
        lambda r: {"prompts": {"name": "json", "data_files": str(r / "prompts.json"), "column": "text"}},
        "`task.prompts` has no column text; json has instruction, input",
    ),
    "no pair column": (
        lambda r: {"pairs": {**pairs_of(r), "chosen": "winner"}},
        "`task.pairs` has no column winner; json has prompt, chosen, rejected",
    ),
    "few prompts": (lambda r: {"train_pairs": 500}, "`task.prompts` must have 514 different prompts of at most 8"),
    "few pairs": (lambda r: {"pairs": pairs_of(r), "train_pairs": 500}, "`task.pairs` must have 508 pairs"),
    "gold without template": (
        lambda r: {"gold": {"name": without_template(r, "gold")}},
        "has no chat template, so that `task.gold.template` must say what it reads",
    ),
    "policy without template": (
        lambda r: {"policy": without_template(r, "policy"), "template": None},
        "has no chat template, so that `task.template` must say",
    ),
    "padding is the end": (lambda r: {"pad_token": "<eos>"}, "a padding token other than its end token"),
    "no such padding": (
        lambda r: {"pad_token": "<none>"},
        "`task.pad_token` must be a token that .*policy has, got '<none>'",
    ),
    "no such padding of gold": (
        lambda r: {"gold": {"name": str(r / "gold"), "pad_token": "<none>"}},
        "`task.gold.pad_token` must be a token that .*gold has, got '<none>'",
    ),
    "not a table": (
        lambda r: {"prompts": {"name": "json", "data_files": str(r / "policy" / "model.safetensors")}},
        "`task.prompts` must be a data set that this machine can reach.*could not be loaded",
    ),
    "too long": (lambda r: {"max_answer_tokens": 60}, r"must be at most the 64 positions of task.policy, got 68"),
}


@pytest.mark.parametrize(("task", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_task_say_what_to_do(task, message, root):
    with pytest.raises(ValueError, match=message):
        Arms(study_on(root, task(root)), "alpaca", 0)


def test_reward_models_must_read_the_policys_tokens(root, tmp_path):
    tiny_model("gpt_neox", "ForCausalLM").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    arms = Arms(study_on(root, {"policy": str(tmp_path)}), "alpaca", 0)
    with pytest.raises(ValueError, match="must have the tokenizer of `task.policy`.*differ in 1 tokens, '<new>'"):
        arms.make("dense")
    missing = Arms(study_on(root, model={"folder": str(tmp_path / "nowhere")}), "alpaca", 0)
    with pytest.raises(ValueError, match="`model.folder` must be a folder or .*nowhere"):
        missing.make("dense")


def test_what_is_not_installed_is_said_before_anything_is_trained(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match="`task.prompts` needs the package `datasets`"):
            Arms(study_on(root), "alpaca", 0)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match=r"rloo and grpo need TRL, which is not installed: pip install 'ummrm\[trl\]'"):
        run_study(study_on(root), tmp_path, progress=False)
    assert not (tmp_path / "units").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: tiny_study({"moe": {"kind": "moe", "rloo": True}}), "`rloo` and `grpo` of the arm 'moe' need"),
        (lambda r: study_on(r, model={"model_type": "llama"}), "`model.folder` must name the checkpoint"),
        (
            lambda r: study_on(r, {"kind": "text"}),
            "task.kind must be one of synthetic, checkpoints, got 'text'",
        ),
        (lambda r: study_on(r, {"template": "no place"}), "`template` must be a text with {prompt}"),
        (lambda r: study_on(r, {"dtype": "float16"}), "`dtype` must be one of float32, bfloat16"),
        (
            lambda r: study_on(r, {"selection_prompts": 9}),
            "`selection_prompts` must be at most policy_prompts=6",
        ),
        (lambda r: study_on(r, rloo={"generations": 3}), "`batch_size` must be a multiple of `generations`"),
        (lambda r: study_on(r, grpo={"steps": 5}), "`measure_every` must be below steps=5"),
        (
            lambda r: study_on(r, measure={"ppo_window": 4}),
            "`measure.ppo_window` must be at most the 3 measurements",
        ),
        (
            lambda r: study_on(r, {"gold": {"name": "x", "template": "{prompt}"}}),
            "text with {prompt} and {answer}",
        ),
    ],
)
def test_mistakes_in_the_study_are_refused_when_it_is_read(make, message, root):
    with pytest.raises(ValueError, match=message):
        make(root)


def test_a_study_on_checkpoints_is_its_plain_data(root):
    study = StudyConfig.from_dict(data_on(root, {"pairs": pairs_of(root)}))
    assert StudyConfig.from_dict(study.to_dict()) == study
    assert study.to_dict()["regimes"]["alpaca"]["task"]["kind"] == "checkpoints"


def test_the_regime_of_the_documentation_is_one(root):
    page = (ROOT / "lab" / "README.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)]
    ratings, mine = (block for block in blocks if "regimes" in block)
    assert RatingsTaskConfig(**ratings["regimes"]["ratings"]["task"]).train_pairs == 400
    study = study_on(root, **mine)
    assert isinstance(study.regimes["mine"].task, CheckpointTaskConfig) and study.model.folder


@pytest.mark.parametrize("name", ["pythia", "qwen"])
def test_the_studies_on_checkpoints_name_everything_and_say_that_they_never_ran(name):
    study = load_study(name)
    (regime,) = study.regimes.values()
    assert study.model.folder and regime.task.policy and regime.task.gold.name and regime.task.prompts.name
    assert {o for arm in study.arms for o in study.optimisers(arm)} == {"best_of_n", "ppo", "rloo", "grpo"}
