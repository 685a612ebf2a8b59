"""Distillation: what it learns, on which texts and scale, and that it resumes with the same bits."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkout import SUPPORT
from datasets import Dataset
from ensembles import mixture
from peft import LoraConfig
from tiny_models import tiny_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardTrainer
from trl_inputs import make_dataset, make_tokenizer, settings

import ummrm
from ummrm import UmmDistillConfig, UmmDistillTrainer
from ummrm.hf.ensembles import score_texts
from ummrm.trainer import teacher_scores


@pytest.fixture(scope="module")
def teacher():
    return mixture()


def config(folder, **overrides):
    return settings(folder, UmmDistillConfig, **{"learning_rate": 5e-3, **overrides})


def make_trainer(folder, student, teacher=None, data=None, tokenizer=None, trainer=UmmDistillTrainer, **overrides):
    names = ("teacher_processing_class", "eval_dataset", "peft_config", "callbacks")
    options = {k: overrides.pop(k) for k in names if k in overrides}
    return trainer(
        student,
        config(folder, **overrides),
        teacher=teacher,
        train_dataset=make_dataset(24, kind="explicit") if data is None else data,
        processing_class=tokenizer or make_tokenizer(),
        **options,
    )


def raw_scores(model, trainer):
    return score_texts(model, trainer.train_dataset["input_ids"][:], 4)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_it_lowers_the_gap_to_the_ensemble_on_texts_that_it_has_not_seen(teacher, tmp_path):
    teacher.train()
    teacher.model.layers[1].eval()
    modes = [m.training for m in teacher.modules()]
    trainer = make_trainer(
        tmp_path,
        ummrm.merge(teacher),
        teacher,
        make_dataset(512, kind="explicit"),
        eval_dataset=make_dataset(100, 1, kind="explicit"),
        learning_rate=1e-3,
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=32,
        logging_steps=100,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert [m.training for m in teacher.modules()] == modes
    teacher.eval()
    assert after["eval_teacher_gap"] < 0.75 * before["eval_teacher_gap"], (before, after)
    for key in ("eval_teacher_correlation", "eval_teacher_agreement"):
        assert after[key] > before[key] + 0.02, (before, after)


def test_one_call_gives_a_stock_student_with_a_card_and_a_stated_scale(teacher, tmp_path):
    student, data = ummrm.merge(teacher), make_dataset(8, kind="explicit")
    done = ummrm.distill(student, teacher, data, make_tokenizer(), config(tmp_path))
    assert done is student and not student.training
    ummrm.save_pretrained(student, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Merged reward model" in text and "## Distillation" in text and "UmmLlamaForSequenceClassification" in text
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(student) and ummrm.reward_normalization(loaded) == ummrm.reward_normalization(student)


@pytest.mark.parametrize("combine", ["mean", "worst", "uwo"])
def test_the_loss_is_that_of_its_definition(combine, teacher, tmp_path):
    other = tiny_model("llama")
    trainer = make_trainer(
        tmp_path,
        ummrm.merge(teacher),
        [teacher, other],
        make_dataset(6, kind="explicit"),
        combine=combine,
        uncertainty=0.3,
        max_steps=1,
        per_device_train_batch_size=12,
    )
    scores = torch.cat([raw_scores(teacher, trainer), raw_scores(other, trainer)], 1)
    normal = (scores - scores.mean(0)) / scores.std(0, correction=0)
    combined = {
        "mean": normal.mean(1),
        "worst": normal.amin(1),
        "uwo": normal.mean(1) - 0.3 * normal.var(1, correction=0),
    }[combine]
    target = (combined - combined.mean()) / combined.std(correction=0)
    assert trainer.train_dataset["target"][:] == pytest.approx(target.tolist(), abs=1e-5)
    own = raw_scores(trainer.model, trainer).squeeze(1)
    own = (own - own.mean()) / own.std(correction=0)
    loss = (own - target).square().mean().item()
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert entry["loss"] == pytest.approx(loss, rel=1e-4)
    assert entry["teacher_gap"] == pytest.approx(loss**0.5, rel=1e-4) == pytest.approx(trainer.gap_at_start, rel=1e-4)
    assert entry["teacher_correlation"] == pytest.approx(torch.corrcoef(torch.stack([own, target]))[0, 1].item(), 1e-4)
    order = [(own[i] > own[j]) == (target[i] > target[j]) for i in range(12) for j in range(i)]
    assert entry["teacher_agreement"] == pytest.approx(sum(order).item() / len(order))
    assert ummrm.reward_normalization(trainer.model).mean == pytest.approx(
        raw_scores(ummrm.merge(teacher), trainer).mean()
    )


def test_every_data_format_gives_the_tokens_of_the_reward_trainer(teacher, tmp_path):
    for kind in ("implicit", "explicit", "conversational", "conversational implicit", "tokenised"):
        data = make_dataset(4, kind=kind)
        theirs = RewardTrainer(
            ummrm.merge(teacher), settings(tmp_path), train_dataset=data, processing_class=make_tokenizer()
        ).train_dataset
        pairs = [ids for row in theirs for ids in (row["chosen_ids"], row["rejected_ids"])]
        ours = make_trainer(tmp_path, ummrm.merge(teacher), teacher, data).train_dataset
        assert ours.column_names == ["input_ids", "target"] and ours["input_ids"][:] == pairs, kind
        rows = list(data)
        if kind == "explicit":
            same = [
                [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows],
                [{"text": r["prompt"] + r["chosen"]} for r in rows],
            ]
        elif kind == "conversational":
            same = [
                [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows],
                [{"messages": r["prompt"] + r["chosen"]} for r in rows],
            ]
        else:
            same = [[{"input_ids": ids} for ids in pairs[::2]]]
        for alike in same:
            found = make_trainer(tmp_path, ummrm.merge(teacher), teacher, Dataset.from_list(alike)).train_dataset
            assert found["input_ids"][:] == pairs[::2], (kind, alike[0].keys())


def respelled():
    """Another tokenizer: other numbers for the words, another chat template."""
    tokenizer = make_tokenizer()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    words = rules["model"]["vocab"]
    last = len(words) - 1
    rules["model"]["vocab"] = {w: (i if w.startswith("<") else last + 6 - i) for w, i in words.items()}
    other = make_tokenizer()
    other._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(rules))
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other.chat_template = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"
    return other


def test_teachers_of_another_family_read_texts_by_their_own_tokenizer(teacher, tmp_path):
    """The same teacher with renumbered words gives the same targets; a folder brings its tokenizer along."""
    tokenizer = make_tokenizer()
    other, dense, renumbered = respelled(), tiny_model("bert"), tiny_model("bert")
    vocabulary, theirs = tokenizer.get_vocab(), other.get_vocab()
    assert vocabulary != theirs
    renumbered.load_state_dict(dense.state_dict())
    table = renumbered.get_input_embeddings().weight.data
    for word, i in vocabulary.items():
        table[theirs[word]] = dense.get_input_embeddings().weight.data[i]
    data = make_dataset(8, kind="explicit")
    expected = make_trainer(tmp_path, ummrm.merge(teacher), dense, data).train_dataset["target"][:]
    given = make_trainer(tmp_path, ummrm.merge(teacher), renumbered, data, teacher_processing_class=other)
    assert given.train_dataset["target"][:] == pytest.approx(expected, abs=1e-5)
    renumbered.save_pretrained(tmp_path / "bert")
    other.save_pretrained(tmp_path / "bert")
    found = make_trainer(tmp_path, ummrm.merge(teacher), [str(tmp_path / "bert"), teacher], data)
    assert found.teacher_scale.members[0] == pytest.approx(given.teacher_scale.members[0], rel=1e-5)
    assert len(found.teacher_scale.members) == 5 and found._members[0].model is None
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="`teacher_processing_class` must be given for BertForSeq.* another vocab"):
        make_trainer(tmp_path, ummrm.merge(teacher), loaded, data)
    with pytest.raises(ValueError, match="`teacher_processing_class` must .* which has 70 tokens where the student"):
        make_trainer(tmp_path, ummrm.merge(teacher), tiny_model("bert", vocab_size=70), data)
    with pytest.raises(ValueError, match="must be text where a teacher has a tokenizer of its own"):
        make_trainer(
            tmp_path, ummrm.merge(teacher), loaded, make_dataset(4, kind="tokenised"), teacher_processing_class=other
        )


def test_the_scale_depends_on_neither_order_nor_evaluation_set(teacher, tmp_path):
    rows = list(make_dataset(20, kind="explicit", longest=20))
    one, other = (
        make_trainer(tmp_path / str(i), ummrm.merge(teacher), teacher, Dataset.from_list(r), eval_dataset=held_out)
        for i, (r, held_out) in enumerate([(rows, None), (rows[::-1], {"few": make_dataset(3, 2, kind="explicit")})])
    )
    assert one.teacher_scale == other.teacher_scale
    pairs = {tuple(i): t for i, t in zip(one.train_dataset["input_ids"], one.train_dataset["target"], strict=True)}
    again = zip(other.train_dataset["input_ids"], other.train_dataset["target"], strict=True)
    assert all(pairs[tuple(ids)] == target for ids, target in again)
    metrics = other.evaluate()
    direct = other.evaluate(make_dataset(3, 2, kind="explicit"))
    assert metrics["eval_few_teacher_gap"] == direct["eval_teacher_gap"]
    assert metrics["eval_few_teacher_gap"] == pytest.approx(metrics["eval_few_loss"] ** 0.5)


def test_scores_that_are_there_already_need_no_teacher(teacher, tmp_path):
    data = make_dataset(8, kind="explicit")
    scored = make_trainer(tmp_path, ummrm.merge(teacher), teacher, data)
    members = raw_scores(teacher, scored).tolist()
    columns = {"chosen_teacher_score": members[::2], "rejected_teacher_score": members[1::2]}
    given = data
    for name, values in columns.items():
        given = given.add_column(name, values)
    trainer = make_trainer(tmp_path, ummrm.merge(teacher), data=given)
    assert trainer.train_dataset["target"][:] == pytest.approx(scored.train_dataset["target"][:], abs=1e-5)
    texts = Dataset.from_list([{"text": f"w{i} w3", "teacher_score": i * i} for i in range(9)])
    trainer = make_trainer(tmp_path, ummrm.merge(teacher), data=texts, max_steps=1)
    trainer.train()
    mean, std = trainer.teacher_scale.members[0]
    assert trainer.train_dataset["target"][:] == pytest.approx([(i * i - mean) / std for i in range(9)])
    assert "scores of the data" in trainer.training_notes()


def test_over_long_texts_are_counted_and_dropped(teacher, tmp_path):
    data = Dataset.from_list([{"text": "w1 " * n} for n in (2, 3, 4, 30)])
    with pytest.warns(UserWarning, match=r"1 of 4 texts \(25.0%\) of the train set are longer than max_length=10"):
        trainer = make_trainer(tmp_path, ummrm.merge(teacher), teacher, data, max_length=10)
    assert len(trainer.train_dataset) == 3 and trainer.long_pairs["train"].long == 1
    assert "over-long texts, train | 1 of 4" in trainer.training_notes()
    with pytest.raises(ValueError, match="must leave some texts, and all 4 texts of the train set are longer"):
        make_trainer(tmp_path, ummrm.merge(teacher), teacher, data, max_length=1)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_it_resumes_with_the_same_bits_and_scores_nothing_again(teacher, tmp_path, monkeypatch):
    data = {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", ummrm.merge(teacher), teacher, **data)
    whole.train()
    make_trainer(tmp_path / "cut", ummrm.merge(teacher), teacher, callbacks=[Stop()], **data).train()
    # even where what goes on is the checkpoint's own model, whose scores have moved by then
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut" / "checkpoint-3")
    monkeypatch.setattr(teacher, "member_scores", lambda **inputs: pytest.fail("the teacher scored again"))
    rest = make_trainer(tmp_path / "cut", student, teacher, **data)
    rest.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(rest, "loss") == logged(whole, "loss") and rest.gap_at_start == whole.gap_at_start
    assert ummrm.reward_normalization(rest.model) == ummrm.reward_normalization(whole.model)
    monkeypatch.undo()
    other = make_trainer(tmp_path / "cut", ummrm.merge(teacher), teacher, combine="worst", **data)
    with pytest.raises(ValueError, match="must be of the same texts, teacher and `combine`"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "cut" / "checkpoint-6" / "distillation.json").unlink()
    with pytest.raises(ValueError, match="has no distillation.json; resume with the trainer that wrote it"):
        rest.train(resume_from_checkpoint=True)


def test_a_killed_run_keeps_the_scores_of_the_teachers_that_were_done(teacher, tmp_path, monkeypatch):
    second, scored = tiny_model("llama"), []

    def scoring(model):
        name = "member_scores" if model is teacher else "forward"
        own = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, **kwargs: (scored.append(model), own(*args, **kwargs))[1])

    scoring(teacher)
    scoring(second)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(second, "forward", lambda **inputs: (_ for _ in ()).throw(KeyboardInterrupt()))
        make_trainer(tmp_path, ummrm.merge(teacher), [teacher, second])
    assert set(scored) == {teacher}
    scored.clear()
    first = make_trainer(tmp_path, ummrm.merge(teacher), [teacher, second])
    assert set(scored) == {second}
    scored.clear()
    again = make_trainer(tmp_path, ummrm.merge(teacher), [teacher, second])
    assert not scored and again.train_dataset["target"][:] == first.train_dataset["target"][:]
    files = sorted((tmp_path / teacher_scores.FOLDER).iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        mended = make_trainer(tmp_path, ummrm.merge(teacher), [teacher, second])
    assert set(scored) == {teacher, second} and mended.teacher_scale == first.teacher_scale
    assert sorted((tmp_path / teacher_scores.FOLDER).iterdir()) == files
    scored.clear()
    with torch.no_grad():
        second.score.weight.mul_(2)
    make_trainer(tmp_path, ummrm.merge(teacher), [teacher, second])
    assert set(scored) == {second}  # other weights are another teacher


def test_accumulated_gradients_are_those_of_one_batch_and_autocast_trains(teacher, tmp_path):
    data = make_dataset(8, kind="explicit", longest=20)
    plain = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0}
    whole = make_trainer(tmp_path, ummrm.merge(teacher), teacher, data, per_device_train_batch_size=16, **plain)
    parts = make_trainer(
        tmp_path,
        ummrm.merge(teacher),
        teacher,
        data,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        **plain,
    )
    for trainer in (whole, parts):
        trainer.train()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert logged(parts, "teacher_gap") == pytest.approx(logged(whole, "teacher_gap"), rel=1e-4)
    low = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 16}
    low = make_trainer(tmp_path, ummrm.merge(teacher), teacher, data, **low)
    low.train()
    assert logged(low, "loss")[0] == pytest.approx(whole.gap_at_start**2, rel=0.1)
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_adapters_are_distilled_into_and_saved(teacher, tmp_path):
    adapters = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
    trainer = make_trainer(
        tmp_path, ummrm.merge(teacher), teacher, peft_config=adapters, max_steps=20, per_device_train_batch_size=48
    )
    trainer.train()
    gaps = logged(trainer, "teacher_gap")
    assert gaps[-1] < 0.9 * trainer.gap_at_start
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    folded = trainer.model.merge_and_unload()
    assert ummrm.reward_normalization(folded) == trainer._student


def test_a_saved_student_says_what_it_was_taught(teacher, tmp_path):
    trainer = make_trainer(
        tmp_path, ummrm.merge(teacher), teacher, combine="uwo", uncertainty=0.25, eval_dataset=make_dataset(4, 3)
    )
    trainer.train()
    trainer.evaluate()
    out = tmp_path / "out"
    trainer.save_model(str(out))
    text = (out / "README.md").read_text()
    for part in ("combined by | uwo, 0.25", "members | 4", "texts | 48", "| steps | 4 |", "eval_teacher_correlation"):
        assert part in text, part
    assert f"at the start, in its standard deviations | {trainer.gap_at_start:.4g}" in text
    record = json.loads((out / "distillation.json").read_text())
    assert record["combine"] == "uwo" and len(record["members"]) == 4
    student = AutoModelForSequenceClassification.from_pretrained(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the normalisation is not dropped: it stays true
        make_trainer(tmp_path / "more", student, teacher, max_steps=1).train()
    measured = trainer.normalize_rewards()
    scores = raw_scores(trainer.model, trainer)
    assert measured.mean == pytest.approx(scores.mean().item()) and measured != trainer._student


@pytest.mark.full
def test_two_processes_equal_one(teacher, tmp_path):
    script = SUPPORT / "distillation_child.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = torch.load(Path(tmp_path) / "out.pt", weights_only=False)
    from distillation_child import train

    alone = train(tmp_path / "alone", per_device_train_batch_size=4)
    assert found["scale"] == alone["scale"] and found["targets"] == alone["targets"]
    for name, parameter in alone["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], parameter, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("eval_teacher_gap", "eval_teacher_correlation", "eval_teacher_agreement", "eval_std_reward"):
        assert found["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-4), key
