"""Ensembles as reward functions: members of a mixture and other models, normalised, combined, and what is refused."""

import pytest
import torch
from ensembles import mixture
from tiny_models import tiny_model
from trl_inputs import make_pairs, make_tokenizer, message

import ummrm
from ummrm import RewardNormalization
from ummrm.hf.ensembles import score_texts
from ummrm.hf.texts import joined, texts_of, token_ids

TOKENIZER = make_tokenizer()
PAIRS = make_pairs(6)
PROMPTS, COMPLETIONS = [p["prompt"] for p in PAIRS], [" " + p["chosen"] for p in PAIRS]


@pytest.fixture(scope="module")
def moe():
    return mixture()


def one_by_one(model, texts):
    """Scores of texts without padding, [N, members]."""
    rows = []
    for text in texts:
        if isinstance(text, str):
            ids = TOKENIZER(text + TOKENIZER.eos_token)["input_ids"]
        else:
            ids = TOKENIZER.apply_chat_template(text, tokenize=True, return_dict=True)["input_ids"]
        ids = torch.tensor([ids])
        rows.append(model.member_scores(input_ids=ids) if hasattr(model, "member_scores") else model(ids).logits)
    return torch.cat(rows).detach().double()


@pytest.mark.parametrize("combine", ["mean", "worst", "uwo"])
@pytest.mark.parametrize("conversational", [False, True], ids=["text", "conversation"])
def test_members_of_a_mixture_and_other_models_reward_together(combine, conversational, moe):
    other = tiny_model("bert").train()
    prompts, completions = PROMPTS, COMPLETIONS
    if conversational:
        prompts = [[message("user", p)] for p in prompts]
        completions = [[message("assistant", c.strip())] for c in completions]
    reference = [{"prompt": p["prompt"], "chosen": " " + p["chosen"], "rejected": " " + p["rejected"]} for p in PAIRS]
    reward = ummrm.ensemble_reward(
        [moe, other], TOKENIZER, combine=combine, uncertainty=0.7, reference=reference, batch_size=4
    )
    other.eval()
    texts = [row["prompt"] + row[key] for row in reference for key in ("chosen", "rejected")]
    known = torch.cat([one_by_one(moe, texts), one_by_one(other, texts)], 1)
    assert [n.mean for n in reward.normalization] == pytest.approx(known.mean(0).tolist(), abs=1e-6)
    assert [n.std for n in reward.normalization] == pytest.approx(known.std(0, correction=0).tolist(), rel=1e-5)
    answers = [p + c for p, c in zip(prompts, completions, strict=True)]
    scores = torch.cat([one_by_one(moe, answers), one_by_one(other, answers)], 1)
    scales = [(n.mean, n.std) for n in reward.normalization]
    expected = ummrm.combine_scores(scores, combine, uncertainty=0.7, scales=scales).tolist()
    other.train()
    found = reward(prompts=prompts, completions=completions, completion_ids=None, answer=[1] * 6, trainer_state=None)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5) and all(type(r) is float for r in found)
    assert other.training and reward.__name__ == f"ensemble_{combine}" and reward([], []) == []


def test_normalisations_are_given_or_the_models_own(moe, tmp_path):
    first, second = tiny_model("llama"), tiny_model("llama")
    one = ummrm.ensemble_reward(first, TOKENIZER, name="mine")
    raw = one_by_one(first, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]).flatten()
    assert one(PROMPTS, COMPLETIONS) == pytest.approx(raw.tolist(), rel=1e-4) and one.__name__ == "mine"
    for pattern, models in (("reference` must be given: Llama", [first, second]), ("given: UmmLlama", moe)):
        with pytest.raises(ValueError, match=pattern):
            ummrm.ensemble_reward(models, TOKENIZER)
    own = [RewardNormalization(0.5, 2.0), RewardNormalization(-1.0, 0.5)]
    for model, normalization in zip((first, second), own, strict=True):
        ummrm.set_reward_normalization(model, normalization)
    first.save_pretrained(tmp_path / "first")
    TOKENIZER.save_pretrained(tmp_path / "first")
    stored = ummrm.ensemble_reward([str(tmp_path / "first"), second], TOKENIZER)
    given = ummrm.ensemble_reward([first, second], [TOKENIZER, TOKENIZER], normalization=own)
    assert stored.normalization == given.normalization == own
    assert stored(PROMPTS, COMPLETIONS) == pytest.approx(given(PROMPTS, COMPLETIONS))


def test_a_texts_score_depends_on_neither_order_nor_share(moe):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (23,), generator=generator).tolist()
    ids = [torch.randint(6, 60, (n,), generator=generator).tolist() for n in lengths]
    whole = score_texts(moe, ids, 4)
    assert whole.shape == (23, 4) and whole.dtype == torch.float64
    assert torch.equal(score_texts(moe, ids[::-1], 4).flip(0), whole)
    for processes in (2, 9):  # more processes than batches too
        parts = [score_texts(moe, ids, 4, share=(rank, processes)) for rank in range(processes)]
        assert torch.equal(sum(parts), whole)


def test_texts_are_made_of_rows_as_trl_makes_them():
    assert texts_of({"prompt": "a", "chosen": " b", "rejected": " c"}) == ["a b", "a c"]
    assert texts_of({"messages": [message("user", "a")], "prompt": None}) == [[message("user", "a")]]
    assert token_ids(TOKENIZER, "w1 <eos>") == token_ids(TOKENIZER, "w1 ") == [7, 2]
    tools = "{% for t in tools %}{{ t['name'] + ' ' }}{% endfor %}{{ word }}"
    row = {"tools": '[{"name": "w1"}, {"name": "w2"}]', "chat_template_kwargs": {"chat_template": tools, "word": "w3"}}
    assert token_ids(TOKENIZER, [message("user", "a")], row) == [7, 8, 9]
    with pytest.raises(ValueError, match="a row of the data must have .* got answer"):
        texts_of({"answer": "a"})
    with pytest.raises(ValueError, match="must both be text or both be lists of messages, got NoneType and str"):
        joined("a", None)


def test_misuse_is_a_clear_error(moe):
    model, two_labels = tiny_model("llama"), tiny_model("bert", num_labels=2)
    for error, pattern, options in (
        (ValueError, "`combine` must be one of 'mean'", {"combine": "median"}),
        (ValueError, "`batch_size` must be an integer of at least 1, got 0", {"batch_size": 0}),
        (ValueError, "`tokenizer` must be given for LlamaFor.* got None", {"tokenizer": None}),
        (ValueError, "one tokenizer, or one for each of the 1 models", {"tokenizer": [TOKENIZER] * 2}),
        (
            ValueError,
            "one for each of the 4 members, got 1",
            {"models": moe, "normalization": [RewardNormalization(0.0, 1.0)]},
        ),
        (
            TypeError,
            "a RewardNormalization for each member, got \\(0.0",
            {"models": moe, "normalization": [(0.0, 1.0)] * 4},
        ),
        (TypeError, "`reference` must be a list of texts or a data set of rows, got a str", {"reference": "w1 w2"}),
        (TypeError, "got a dict; put .* of several splits name one", {"reference": {"train": ["w1"]}}),
        (ValueError, "`reference` must be text, .*; give `prompt` and", {"reference": [{"input_ids": [3]}]}),
        (ValueError, "`reference` must be None where `normalization`", {"normalization": [], "reference": ["w1"]}),
        (ValueError, "`reference` must hold texts .* got none", {"reference": []}),
        (
            ValueError,
            r"`models\[0\]` must give one reward .*num_labels=2",
            {"models": [two_labels]},
        ),
        (TypeError, "`models` must have a reward head, got a LlamaModel", {"models": model.model}),
    ):
        with pytest.raises(error, match=pattern):
            ummrm.ensemble_reward(**{"models": model, "tokenizer": TOKENIZER, **options})
    reward = ummrm.ensemble_reward(model, TOKENIZER)
    with pytest.raises(ValueError, match="must both be text or both be lists of messages"):
        reward(["w1"], [[message("assistant", "w2")]])
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="must name its padding token .* set model.config.pad_token_id"):
        reward(["w1"], ["w2"])
    model.config.pad_token_id = 0
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="must give finite scores, and Llama.* for 1 of 1 texts"):
        reward(["w1"], ["w2"])
    with pytest.raises(ValueError, match="texts must have tokens, got none in text 1"):
        score_texts(moe, [[3], []], 2)
