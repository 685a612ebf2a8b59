"""Rewards of texts against a plain loop of transformers, in the order of the texts; limits, padding, and refusals."""

import json

import numpy as np
import pytest
import torch
from ensembles import mixture
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer
from trl_inputs import make_dataset, make_pairs, make_tokenizer, message, settings

import ummrm
from ummrm.evaluation import RewardScorer, ScoringError
from ummrm.evaluation.texts import flattened, text_of_line

TEXTS = [f"{p['prompt']} {p[name]}" for p in make_pairs(12, longest=20) for name in ("chosen", "rejected")]


def plain_loop(model, tokenizer, texts):
    """A text at a time, as anybody would."""
    rewards = []
    for text in texts:
        if isinstance(text, str):
            ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(text, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            rewards.append(model(input_ids=ids).logits.item())
    return np.array(rewards)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_scores_are_those_of_a_plain_loop_in_its_order(model_type, tmp_path):
    tokenizer = make_tokenizer()
    tiny_model(model_type).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = RewardScorer.load(tmp_path, batch_size=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    chats = [[message("user", text), message("assistant", text[::-1])] for text in TEXTS[:4]]
    texts = [*TEXTS, *chats, TEXTS[0]]
    found = scorer.score(texts)
    known = plain_loop(model, tokenizer, texts)
    np.testing.assert_allclose(found.rewards, known, rtol=1e-5, atol=1e-5)
    assert len(set(np.round(known, 4))) > 20, "rewards that are all alike would hide an order"
    assert found.rewards[0] == found.rewards[-1] and not found.cut.any() and found.members is None
    assert scorer.name == tmp_path.name and found.tokens[0] == len(TEXTS[0].split()) + 1
    assert len(scorer.score([]).rewards) == 0


@pytest.mark.parametrize("kind", ["implicit", "explicit", "conversational"])
def test_tokens_are_those_that_trl_trains_on(kind, tmp_path):
    tokenizer, data = make_tokenizer(), make_dataset(4, kind=kind)
    trainer = RewardTrainer(
        tiny_model("llama"), settings(tmp_path), train_dataset=data, processing_class=make_tokenizer()
    )
    scorer = RewardScorer(tiny_model("llama"), tokenizer)
    for row, trained in zip(data, trainer.train_dataset, strict=True):
        for name in ("chosen", "rejected"):
            text = row["prompt"] + row[name] if "prompt" in row else row[name]
            assert scorer.tokens(text) == list(trained[f"{name}_ids"])


def test_texts_taken_together_have_the_tokens_of_each_alone():
    tokenizer = make_tokenizer()
    scorer = RewardScorer(tiny_model("llama"), tokenizer)
    chat = [{"role": "user", "content": "w1"}]
    texts = ["w1 w2", chat, "", f"w3{tokenizer.eos_token}", "w4 " * 90]
    assert scorer.tokens_of_many(texts) == [scorer.tokens(text) for text in texts]
    assert scorer.tokens_of_many([]) == [] and scorer.tokens_of_many([chat]) == [scorer.tokens(chat)]
    with pytest.raises(ValueError):
        scorer.tokens_of_many(["w1", "\ud800"])


def test_members_their_mean_and_their_spread():
    model = mixture()
    scorer = RewardScorer(model, make_tokenizer(), members=True, batch_size=4)
    found = scorer.score(TEXTS)
    assert found.members.shape == (24, 4)
    for member in range(4):
        ummrm.set_evaluation(model, member)
        alone = plain_loop(model, make_tokenizer(), TEXTS)
        np.testing.assert_allclose(found.members[:, member], alone, rtol=1e-5, atol=1e-5)
        assert np.array_equal(scorer.score(TEXTS).rewards, scorer.score(TEXTS).members[:, member])
    ummrm.set_evaluation(model, "mean")
    np.testing.assert_allclose(found.rewards, plain_loop(model, make_tokenizer(), TEXTS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.spread, [np.std(row) for row in found.members])
    assert found.spread.min() > 0 and scorer.score([]).members.shape == (0, 4)
    with pytest.raises(ScoringError, match=r"`members` must be False for .*, which has none"):
        RewardScorer(tiny_model("llama"), make_tokenizer(), members=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_is_cut_counted_and_keeps_its_end_token(side):
    tokenizer, model = make_tokenizer(), tiny_model("llama")
    tokenizer.truncation_side = side
    scorer = RewardScorer(model, tokenizer, max_length=5)
    found = scorer.score(["w1 w2 w3 w4 w5 w6 w7", "w1 w2 w3 w4"])
    kept = "w1 w2 w3 w4" if side == "right" else "w4 w5 w6 w7"
    assert found.cut.tolist() == [True, False] and found.tokens.tolist() == [8, 5] and scorer.max_length == 5
    assert found.rewards[0] == pytest.approx(RewardScorer(model, tokenizer).score([kept]).rewards[0], abs=1e-6)


def test_limits_are_those_of_model_and_tokenizer():
    tokenizer = make_tokenizer()
    assert RewardScorer(tiny_model("llama"), tokenizer).max_length == 64
    # roberta's positions begin behind the padding's index, 0 here
    assert RewardScorer(tiny_model("roberta"), tokenizer, max_length=500).max_length == 79
    long = " ".join(["w1"] * 90)
    assert RewardScorer(tiny_model("roberta"), tokenizer).score([long]).cut.all()
    tokenizer.model_max_length = 7
    assert RewardScorer(tiny_model("llama"), tokenizer).max_length == 7


def test_a_tokenizer_without_padding_or_end():
    tokenizer, model = make_tokenizer(), tiny_model("llama")
    known = RewardScorer(model, tokenizer).score(TEXTS).rewards
    model.config.pad_token_id = None
    assert np.array_equal(RewardScorer(model, tokenizer).score(TEXTS).rewards, known) and model.config.pad_token_id == 0
    model.config.pad_token_id, tokenizer.pad_token = None, None
    RewardScorer(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.eos_token_id, "TRL pads with the end token then"
    model.config.pad_token_id, tokenizer.eos_token = None, None
    with pytest.raises(ScoringError, match="must have a padding token .* neither names one; set pad_token_id"):
        RewardScorer(model, tokenizer)
    model.config.pad_token_id = 0
    assert RewardScorer(model, tokenizer).tokens("w1 w2") == tokenizer("w1 w2")["input_ids"]


def test_a_conversation_without_a_template_is_refused_or_flattened():
    tokenizer, model = make_tokenizer(), tiny_model("llama")
    tokenizer.chat_template = None
    chat = [message("user", "w1"), message("assistant", "w2")]
    with pytest.raises(ValueError, match="must have a chat template"):
        RewardScorer(model, tokenizer).score([chat])
    flat = RewardScorer(model, tokenizer, flatten=True)
    assert flat.tokens(chat) == flat.tokens("w1\n\nw2") and flattened("as it is") == "as it is"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ScoringError, match="chat template can't be applied: roles must alternate"):
        flat.tokens(chat)


def test_models_that_give_no_reward_are_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tiny_model("llama", num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one reward per sequence, got a .* with num_labels=2"):
        RewardScorer.load(tmp_path)
    tiny_model("llama", "ForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="must have a reward head"):
        RewardScorer.load(tmp_path)
    with pytest.raises(ScoringError, match="`batch_size` must be an integer of at least 1, got 0"):
        RewardScorer(tiny_model("llama"), make_tokenizer(), batch_size=0)
    with pytest.raises(OSError, match="no folder there"):
        RewardScorer.load("./nowhere")


def test_a_dtype_is_what_is_computed_in(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    half, whole = RewardScorer.load(tmp_path, dtype="bfloat16"), RewardScorer.load(tmp_path)
    assert (half.model.dtype, whole.model.dtype) == (torch.bfloat16, torch.float32)
    gap = np.abs(half.score(TEXTS).rewards - whole.score(TEXTS).rewards)
    assert 0 < gap.max() < 0.2


ANSWER = [message("user", "a"), message("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a b"}, "a b"),
        ({"prompt": "a ", "response": "b", "id": 3}, "a b"),
        ({"prompt": "a ", "completion": "b", "text": None}, "a b"),
        ({"messages": ANSWER}, ANSWER),
        ({"prompt": ANSWER[:1], "response": "b"}, ANSWER),
        ({"prompt": ANSWER[:1], "response": ANSWER[1:]}, ANSWER),
    ],
)
def test_a_line_is_a_text(row, text):
    assert text_of_line(json.dumps(row).encode()) == text
    if row.get("prompt") == "a ":
        assert text_of_line(json.dumps(row), as_messages=True) == [message("user", "a "), message("assistant", "b")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a', "no JSON"),
        (b"\xff\xfe", r"not UTF-8 \(byte 1\)"),
        (b"[1]", "must be an object with .*, got a list"),
        (b'{"prompt": "a"}', "must have `text`.*got prompt"),
        (b'{"text": "a", "messages": []}', "one of them alone, got messages, text"),
        (b'{"text": " "}', "text is empty"),
        (b'{"text": 3}', "text must be text, got 3"),
        (b'{"messages": []}', "must be a list of messages, got an empty list"),
        (b'{"messages": [{"role": "user"}]}', "must have role and content, got"),
        (b'{"messages": [{"content": "a"}]}', "must have role and content"),
        (b"[" * 20_000, "no JSON"),
    ],
)
def test_a_line_that_is_none(line, problem):
    with pytest.raises(ValueError, match=problem):
        text_of_line(line)
    with pytest.raises(ValueError, match="an empty line"):
        text_of_line(b" \n", plain=True)
    assert text_of_line(b"{}\r\n", plain=True) == "{}"
