"""Reward models from models without a reward head: the backbone's tensors shared, the head fresh and said to be."""

import warnings

import pytest
import torch
from tiny_models import MODEL_TYPES, in_tier, padded_batch, reward_class, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForTokenClassification
from trl_inputs import make_tokenizer

import ummrm
from ummrm import UpcycleConfig

WITH_HEAD = [m for m in MODEL_TYPES if reward_class(m).__name__.endswith("ForSequenceClassification")]


def language_model(model_type, **overrides):
    config = tiny_config(model_type, **overrides)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForMaskedLM
    torch.manual_seed(0)
    return auto.from_config(config).eval()


@pytest.mark.filterwarnings("ignore:.*fresh head")
@pytest.mark.parametrize("model_type", [in_tier(m) for m in WITH_HEAD])
def test_every_family_gets_a_head_on_its_own_tensors(model_type):
    source = language_model(model_type)
    model = ummrm.reward_model(source, seed=3)
    assert type(model) is reward_class(model_type) and model.config.num_labels == 1
    shared = dict(source.base_model.named_parameters())
    assert all(p is shared.pop(n) for n, p in model.base_model.named_parameters() if n in shared) and not shared
    state = torch.random.get_rng_state()
    other, again = ummrm.reward_model(source.base_model, seed=4), ummrm.reward_model(source.base_model, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    batch = padded_batch(lengths=(9, 4, 2))
    scores = model(**batch).logits
    assert scores.shape == (3, 1) and scores.isfinite().all()
    assert torch.equal(again(**batch).logits, scores) and not torch.equal(other(**batch).logits, scores)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = source.base_model(**batch).last_hidden_state
    torch.testing.assert_close(model.base_model(**batch).last_hidden_state, hidden)


def test_the_head_is_said_to_be_fresh_and_the_rest_stays_as_it_was():
    source = language_model("llama", tie_word_embeddings=True, pad_token_id=None).to(torch.bfloat16).train()
    source.model.layers[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"score of this LlamaFor.* is a fresh head \(seed 0, std 0.5\)"):
        model = ummrm.reward_model(source, make_tokenizer(), head_std=0.5)
    assert model.config.pad_token_id == 0 and source.config.pad_token_id is None
    assert model.score.weight.dtype == torch.bfloat16 and model.training and model.score.weight.requires_grad
    assert 0.3 < model.score.weight.float().std() < 0.7
    assert {p.requires_grad for p in model.model.layers[0].parameters()} == {False}
    assert source.lm_head.weight is source.model.embed_tokens.weight is model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="names no padding token, .*: give `tokenizer`"):
        silent = ummrm.reward_model(source, head_std=0)
    assert silent(input_ids=torch.tensor([[4, 5]])).logits.item() == 0.0


def test_a_folder_and_one_call_to_the_mixture(tmp_path):
    source = language_model("qwen2")
    source.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fresh head"):
        loaded = ummrm.reward_model(tmp_path)
    batch = padded_batch()
    expected = loaded(**batch).logits
    config = UpcycleConfig(num_experts=3, num_experts_per_tok=2)
    for copy in (True, False):
        with pytest.warns(UserWarning, match="fresh head"):
            moe = ummrm.upcycle(source, config, copy=copy, new_head=True)
        assert type(moe).__name__ == "UmmQwen2ForSequenceClassification"
        torch.testing.assert_close(moe(**batch).logits, expected, rtol=1e-5, atol=1e-6)
        if copy:
            assert source.model.embed_tokens.weight is not moe.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="tensors were taken over by ummrm.upcycle"):
        source.config  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ummrm.upcycle(tiny_model("llama"), config)  # no head is made where none is asked for


def test_what_cannot_get_a_head_says_why():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, or the folder .* got Linear"):
        ummrm.reward_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_labels=1; it is a reward model: use it as it is"):
        ummrm.reward_model(tiny_model("llama"))
    with pytest.raises(ValueError, match="num_labels=3; give its backbone: model.base_model"):
        ummrm.reward_model(tiny_model("llama", num_labels=3))
    with pytest.raises(TypeError, match="got a BertForTokenClassification, whose own head .*model.base_model"):
        ummrm.reward_model(AutoModelForTokenClassification.from_config(tiny_config("bert")))
    with pytest.raises(ValueError, match="transformers has none for model_type 'granite'"):
        ummrm.reward_model(AutoModel.from_config(tiny_config("granite")))
    with pytest.raises(ValueError, match="must be a dense model, got a UmmLlamaForSequenceClassification"):
        ummrm.reward_model(ummrm.upcycle(tiny_model("llama"), UpcycleConfig(num_experts=2, num_experts_per_tok=1)))
    source, tokenizer = language_model("llama"), make_tokenizer()
    with pytest.raises(ValueError, match="`head_std` must be a finite number of at least 0, got -1"):
        ummrm.reward_model(source, head_std=-1)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have a padding token .* got no padding or end-of-sequence"):
        ummrm.reward_model(source, tokenizer)
    source.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got another tensor, 'extra.bias'"):
        ummrm.reward_model(source)


def test_a_fresh_head_has_no_normalisation_of_an_old_one():
    with_head = tiny_model("llama")
    ummrm.set_reward_normalization(with_head, ummrm.RewardNormalization(3.0, 5.0))
    config = ummrm.UpcycleConfig(assignment="sequence", experts_in="all")
    kept = ummrm.upcycle(with_head, config, copy=True)
    assert ummrm.reward_normalization(kept) == ummrm.RewardNormalization(3.0, 5.0)
    with pytest.warns(UserWarning, match="fresh"):
        assert ummrm.reward_normalization(ummrm.upcycle(with_head, config, new_head=True, copy=True)) is None
