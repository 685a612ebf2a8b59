"""A reward head for each expert (`experts_in="all"`): drawn anew or copied, with the rows of a call, adapted, refused.

That a member scores with its own head, in every family, is test_sequence_families.py's.
"""

import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import padded_batch, perturb_experts, tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification
from trl_inputs import make_tokenizer

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.registry import umm_class
from ummrm.nn import UpcycledLinear

E = 4
ALL = UpcycleConfig(assignment="sequence", experts_in="all")
GROUPS = torch.tensor([2, 0, 3])
FRESH = pytest.mark.filterwarnings("ignore:.*fresh head")
# A head of one linear map, called on every token; of two, on the first one, with biases.
HEADS = {"llama": ("CausalLM", "score"), "roberta": ("MaskedLM", "classifier.out_proj")}


def mixture(model_type="llama"):
    return perturb_experts(ummrm.upcycle(tiny_model(model_type), ALL))


def head_of(model, model_type):
    return model.get_submodule(HEADS[model_type][1])


# ---- fresh heads ----------------------------------------------------------------------------------------------------


@FRESH
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("model_type", HEADS)
def test_fresh_heads_are_drawn_for_each_expert_from_the_seed_alone(model_type, noise):
    source = tiny_model(model_type, HEADS[model_type][0])
    config, state = UpcycleConfig(**{**ALL.to_dict(), "expert_noise": noise}), torch.random.get_rng_state()
    moe, again, other = (ummrm.upcycle(source, config, copy=True, new_head=True, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state) or noise
    drawn = head_of(moe, model_type)
    assert isinstance(drawn, UpcycledLinear) and drawn.expert_weight.shape == (E, 1, 24)
    dense = ummrm.reward_model(source, seed=3)
    head = head_of(dense, model_type)
    assert torch.equal(drawn.expert_weight[0], head.weight)
    if head.bias is not None:
        assert torch.equal(drawn.expert_bias, torch.zeros(E, 1))
    weights = drawn.expert_weight.flatten(1)
    assert torch.equal(weights, head_of(again, model_type).expert_weight.flatten(1))
    everyones = torch.cat([weights, head_of(other, model_type).expert_weight.flatten(1)])
    assert (torch.corrcoef(everyones) - torch.eye(2 * E)).abs().max() < 0.9  # 24 numbers each
    assert (weights.std(1) / 0.2 - 1).abs().max() < 0.6  # the tiny models' initializer_range
    if not noise:
        batch = padded_batch()
        scores = moe.member_scores(**batch)
        torch.testing.assert_close(scores[:, :1], dense(**batch).logits, rtol=1e-5, atol=1e-5)
        assert scores.std(1).min() > 1e-3
        merged = head_of(ummrm.merge(moe), model_type)
        torch.testing.assert_close(merged.weight, drawn.expert_weight.mean(0))


@FRESH
def test_a_reward_models_head_makes_way_for_fresh_ones_where_that_is_asked_for(tmp_path):
    """A causal language model that transformers has loaded as a reward model is upcycled as itself would be."""
    source = tiny_model("llama", "CausalLM", pad_token_id=None)
    source.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    before = loaded.score.weight.clone()
    moe = ummrm.upcycle(loaded, ALL, copy=True, new_head=True, tokenizer=make_tokenizer(), seed=5)
    same = ummrm.upcycle(source, ALL, copy=True, new_head=True, tokenizer=make_tokenizer(), seed=5)
    assert torch.equal(loaded.score.weight, before) and loaded.config.pad_token_id is None
    ours, theirs = moe.state_dict(), same.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert moe.config.pad_token_id == 0 and moe.config.num_labels == 1
    with pytest.warns(UserWarning, match=r"score of this LlamaFor.* is a fresh head \(seed 5, std 0.2\)"):
        ummrm.upcycle(loaded, ALL, new_head=True, seed=5)
    with pytest.raises(RuntimeError, match="tensors were taken over by ummrm.upcycle"):
        loaded.config  # noqa: B018


def test_trained_heads_are_copies():
    dense, batch = tiny_model("bert"), padded_batch()
    moe = ummrm.upcycle(dense, ALL, copy=True)
    assert torch.equal(moe.classifier.expert_weight, dense.classifier.weight.expand(E, 1, 24))
    assert torch.equal(moe.classifier.expert_bias, dense.classifier.bias.expand(E, 1))
    torch.testing.assert_close(moe(**batch).logits, dense(**batch).logits)
    noisy = ummrm.upcycle(dense, UpcycleConfig(**{**ALL.to_dict(), "expert_noise": 0.1}), copy=True)
    assert noisy.classifier.expert_weight.std(0).min() > 0


# ---- the rows of a call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "opt", "bert"])
def test_nothing_of_a_call_stays_behind(model_type):
    moe, batch = mixture(model_type), padded_batch()
    head = moe.get_submodule(moe.umm_head)
    expected = moe(**batch, groups=GROUPS).logits
    assert head.groups is None
    member_scores, mean = moe.member_scores(**batch), moe(**batch).logits
    assert head.groups is None
    torch.testing.assert_close(expected[:, 0], member_scores[torch.arange(3), GROUPS])
    torch.testing.assert_close(mean[:, 0], member_scores.mean(1))

    def fail(module, args):
        raise KeyError("a hook's own")

    for place in (head, moe.base_model):
        hook = place.register_forward_pre_hook(fail)
        for call in (moe, moe.member_scores, lambda **kw: moe(**kw, groups=GROUPS)):
            with pytest.raises(KeyError, match="own"):
                call(**batch)
            assert head.groups is None
        hook.remove()
    torch.testing.assert_close(pickle.loads(pickle.dumps(moe))(**batch, groups=GROUPS).logits, expected)
    moe.train()
    with pytest.raises(ValueError, match="`groups` must say in training"):
        moe(**batch)
    with pytest.raises(ValueError, match="each of the 3 sequences, got 2"):
        moe(**batch, groups=GROUPS[:2])


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_a_headless_part_of_the_folder_loads_and_a_head_is_never_made_up(model_type, tmp_path):
    moe, batch = mixture(model_type), padded_batch()
    moe.save_pretrained(tmp_path / "moe")
    backbone = AutoModel.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(
        backbone(**batch, groups=GROUPS).last_hidden_state, moe.base_model(**batch, groups=GROUPS).last_hidden_state
    )
    backbone.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"missing: .*expert_weight"):
        type(moe).from_pretrained(tmp_path / "backbone")
    fresh = type(moe).from_pretrained(tmp_path / "backbone", new_head=True)
    weights = fresh.get_submodule(moe.umm_head).expert_weight
    assert weights.std(0).min() > 0 and weights.isfinite().all()


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "adapted", "left alone"])
def test_peft_trains_the_heads_whole_adapts_them_or_leaves_them(kind):
    attention, batch = ["q_proj.expert_weight"], padded_batch()
    parameters = [*attention, "score.expert_weight"] if kind == "adapted" else attention
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if kind == "whole" else {}
    moe = mixture()
    before, scores = moe.score.expert_weight.detach().clone(), moe.member_scores(**batch).detach()
    wrapped = get_peft_model(moe, LoraConfig(r=2, target_modules=[], target_parameters=parameters, **options)).train()
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad and "score" in n}
    assert bool(trained) == (kind != "left alone") and all("modules_to_save" in n or "lora_" in n for n in trained)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        wrapped(**batch, groups=GROUPS).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    adapted = wrapped.member_scores(**batch).detach()
    assert (adapted - scores).abs().max() > 1e-4
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped.member_scores(**batch), scores)
    for refused in (ummrm.prepare_merge, ummrm.merge):
        with pytest.raises(ValueError, match="must hold no adapters"):
            refused(wrapped.get_base_model())
    folded = wrapped.merge_and_unload()
    assert type(folded.score) is UpcycledLinear
    torch.testing.assert_close(folded.member_scores(**batch), adapted, rtol=1e-4, atol=1e-5)
    moved = (folded.score.expert_weight - before).flatten(1).abs().amax(1)
    assert moved[[0, 2, 3]].min() > 0 if trained else moved.max() == 0
    if kind == "whole":
        assert moved[1] == 0  # whose expert had no sequence
    merged = ummrm.merge(folded)
    torch.testing.assert_close(merged.score.weight, folded.score.expert_weight.mean(0))


# ---- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: tiny_model("llama", "CausalLM"),
            {},
            'without a reward head, got "all" for a LlamaForCausalLM.*new_he',
        ),
        (lambda: tiny_model("llama").model, {}, 'without a reward head, got "all" for a LlamaModel'),
        (lambda: tiny_model("bert", "TokenClassification"), {}, 'got "all" for a BertForTokenClassification'),
        (lambda: tiny_model("bert", "MultipleChoice"), {}, 'got "all" for a BertForMultipleChoice'),
        (lambda: tiny_model("llama", num_labels=3), {}, "with num_labels=3; load it with num_labels=1"),
        (lambda: tiny_model("llama", num_labels=3), {"new_head": True}, "num_labels=3; give its backbone"),
        (lambda: tiny_model("llama"), {"seed": 3}, "`seed` must be 0 without new_head=True"),
        (lambda: tiny_model("granite"), {"new_head": True}, "transformers has none for model_type 'granite'"),
    ],
    ids=["causal", "backbone", "tokens", "choices", "labels", "new labels", "seed", "granite"],
)
def test_what_has_no_reward_head_says_what_to_do(make, options, message):
    dense = make()
    keys = set(dense.state_dict())
    with pytest.raises(ValueError, match=message):
        ummrm.upcycle(dense, ALL, **options)
    assert set(dense.state_dict()) == keys  # and is left as it was


def test_a_configuration_of_another_task_is_refused_where_it_is_built():
    moe = mixture()
    for stock in ("LlamaForCausalLM", "LlamaForTokenClassification"):
        with pytest.raises(ValueError, match=f'without a reward head, got "all" for a Umm{stock}'):
            umm_class(type(tiny_model("llama", stock.removeprefix("Llama"))))(moe.config)
    with pytest.raises(ValueError, match="`num_shared_experts` must be by sequence 0 with experts_in=.all"):
        UpcycleConfig(assignment="sequence", experts_in="all", num_shared_experts=1)
    with pytest.raises(ValueError, match="it is a reward model: use it as it is"):
        ummrm.upcycle(tiny_model("llama"), UpcycleConfig(assignment="sequence"), new_head=True)
