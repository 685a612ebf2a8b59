"""Distillation that can't be meant: clear errors, and warnings where a teacher's tokens are guessed."""

import pytest
from datasets import Dataset, IterableDataset
from ensembles import mixture
from test_distillation import config, make_trainer
from tiny_models import tiny_model
from trl_inputs import make_dataset, make_moe, make_tokenizer, message, settings

import ummrm
from ummrm import UmmDistillTrainer


@pytest.fixture(scope="module")
def teacher():
    return mixture()


def test_misuse_is_a_clear_error(teacher, tmp_path):
    def refuse(error, pattern, student=None, **options):
        student = ummrm.merge(teacher) if student is None else student
        with pytest.raises(error, match=pattern):
            make_trainer(tmp_path, student, **{"teacher": teacher, **options})

    refuse(TypeError, r"`model` must be a stock reward model.*ummrm.merge\(ummrm.prepare_merge\(model\)\)", make_moe())
    refuse(TypeError, r"stock reward model.*student = ummrm.merge\(model\)", ummrm.prepare_merge(make_moe()))
    headless = tiny_model("llama", "ForCausalLM")
    refuse(TypeError, "`model` must have a reward head, got a LlamaForCausalLM.*ummrm.reward_model", headless)
    refuse(TypeError, r"`teacher\[1\]` must have a reward head, got a LlamaModel", teacher=[teacher, headless.model])
    refuse(ValueError, "`teacher` must give one reward .*num_labels=3", teacher=tiny_model("llama", num_labels=3))
    refuse(ValueError, "`teacher` must be a mixture, a reward model or a list .* got None", teacher=None)
    refuse(ValueError, "`teacher` must hold at least one reward model, got none", teacher=[])
    refuse(ValueError, "must hold each model once", teacher=[teacher, teacher])
    refuse(TypeError, "`teacher` must be a reward model of transformers, got int", teacher=3)
    student = ummrm.merge(teacher)
    for same in (student, [teacher, student]):
        refuse(ValueError, "`teacher` must be another model than the student", student, teacher=same)
    refuse(ValueError, "one tokenizer, or one for each of the 2 models", teacher=[teacher, tiny_model("llama")],
           teacher_processing_class=[None])  # fmt: skip
    broken = tiny_model("llama")
    broken.score.weight.data.fill_(float("nan"))
    refuse(ValueError, "`teacher` must give finite scores, and Llama.* NaN or infinity for 48 of 48", teacher=broken)
    broken.score.weight.data.zero_()
    refuse(ValueError, "`teacher` must score the training .* and Llama.* all 48 the same", teacher=broken)
    flat = make_trainer(tmp_path, broken, teacher)
    with pytest.raises(ValueError, match="`model` must score the training .*fresh head must not be zero"):
        flat.train()
    rows = [{"prompt": "w1", "answer": "w2"}]
    refuse(ValueError, "must have `prompt` and `completion`.* got answer, prompt", data=Dataset.from_list(rows))
    rows = [{"prompt": "w1", "completion": [message("assistant", "w2")]}]
    refuse(ValueError, "must both be text or both be lists of messages, got list and str", data=Dataset.from_list(rows))
    refuse(ValueError, "at least two texts to learn scores from, got 1", data=Dataset.from_list([{"text": "w1"}]))
    refuse(ValueError, "the train set must hold texts, got none", data=Dataset.from_dict({"text": []}))
    stream = IterableDataset.from_generator(lambda: iter([{"text": "w1"}]))
    refuse(TypeError, "must be a datasets.Dataset.*got IterableDataset; of a stream take the first n", data=stream)
    scored = Dataset.from_list([{"text": "w1", "teacher_score": 1.0}, {"text": "w2", "teacher_score": float("nan")}])
    refuse(ValueError, "`teacher` must be None where the data has scores", data=scored)
    refuse(ValueError, "`teacher_score` must be finite, .* 1 of 2 texts .* first text 1", data=scored, teacher=None)
    rows = [{"text": "w1", "teacher_score": 1.0}, {"text": "w2", "teacher_score": None}]
    refuse(ValueError, "every text must have a score", data=Dataset.from_list(rows), teacher=None)
    silent = make_tokenizer()
    silent.chat_template = None
    refuse(ValueError, "must have a chat template", data=make_dataset(4, kind="conversational"), tokenizer=silent)
    named = (
        ("combine", "median"),
        ("uncertainty", -1.0),
        ("center_rewards_coefficient", 0.1),
        ("teacher_batch_size", 0),
    )
    for name, value in named:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            config(tmp_path, **{name: value})
    with pytest.raises(TypeError, match="`args` must be an UmmDistillConfig, got RewardConfig"):
        UmmDistillTrainer(student, settings(tmp_path), teacher=teacher, train_dataset=make_dataset(4))
    with pytest.raises(ValueError, match="`processing_class` must be the student's tokenizer, got None"):
        ummrm.distill(ummrm.merge(teacher), teacher, make_dataset(4))
    student.save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    refuse(ValueError, "another model than the student", str(tmp_path / "student"), teacher=tmp_path / "student")


def test_a_prediction_needs_no_training_and_a_path_may_be_a_path(teacher, tmp_path):
    ummrm.merge(teacher).save_pretrained(tmp_path / "student")
    trainer = make_trainer(tmp_path / "out", tmp_path / "student", teacher)
    assert trainer.predict(trainer.train_dataset).metrics["test_loss"] > 0


def test_a_teacher_in_memory_whose_tokens_nobody_knows_is_said(tmp_path):
    """Its folder's tokenizer has another template; or there is none, and the student comes from elsewhere."""
    other = tiny_model("llama")
    other.save_pretrained(tmp_path / "teacher")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' w3 ' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "teacher")
    in_memory = type(other).from_pretrained(tmp_path / "teacher")
    with pytest.warns(UserWarning, match="another chat template, end token or rules; .*`teacher_processing_class`"):
        make_trainer(tmp_path / "a", tiny_model("llama"), in_memory)
    (tmp_path / "teacher/tokenizer.json").unlink()
    (tmp_path / "teacher/tokenizer_config.json").unlink()
    with pytest.warns(UserWarning, match="nothing but the number of embeddings is known of it"):
        make_trainer(tmp_path / "b", tiny_model("llama"), in_memory)
