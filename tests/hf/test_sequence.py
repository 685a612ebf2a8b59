"""Assignment by sequence in Hugging Face models: members, gradients, row order, padding, and what is refused."""

import copy

import pytest
import torch
from tiny_models import padded_batch, perturb_experts, tiny_model

import ummrm
from ummrm import UpcycleConfig
from ummrm.nn.assignment import sequence_modules

E = 4
SETTINGS = {
    "ffn": UpcycleConfig(assignment="sequence"),
    "linear": UpcycleConfig(assignment="sequence", experts_in="linear"),
    "all": UpcycleConfig(assignment="sequence", experts_in="all"),
    "shared": UpcycleConfig(assignment="sequence", num_shared_experts=1, fixed_shared_weight=0.25),
    "top layer": UpcycleConfig(assignment="sequence", layers=(-1,)),
}
LENGTHS = (9, 4, 1, 7, 6)
GROUPS = torch.tensor([2, 0, 3, 2, 0])


def mixture(model_type="llama", setting="ffn", task=None, **overrides):
    """A mixture whose members differ."""
    return perturb_experts(ummrm.upcycle(tiny_model(model_type, task, **overrides), SETTINGS[setting]))


def batch_of(**kwargs):
    return padded_batch(lengths=LENGTHS, **kwargs)


def looped(moe, batch, groups):
    """The same by a loop: each member's rows by themselves, all through that member."""
    out = None
    for member in range(E):
        rows = (groups == member).nonzero()[:, 0]
        if len(rows):
            part = {key: value[rows] for key, value in batch.items()}
            logits = moe(**part, groups=torch.full((len(rows),), member)).logits
            out = logits.new_empty(len(groups), 1) if out is None else out
            out = out.index_copy(0, rows, logits)
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_members_and_their_mean(model_type, setting, side):
    moe, batch = mixture(model_type, setting), batch_of(side=side)
    with torch.no_grad():
        scores = moe.member_scores(**batch)
        assert scores.shape == (5, E) and scores.std(1).min() > 1e-4
        for member in range(E):
            alone = moe(**batch, groups=torch.full((5,), member)).logits[:, 0]
            torch.testing.assert_close(alone, scores[:, member])
            ummrm.set_evaluation(moe, member)
            torch.testing.assert_close(moe(**batch).logits[:, 0], alone)
        ummrm.set_evaluation(moe, "mean")
        labels = torch.randn(5)
        moe.config.problem_type = "regression"
        mean = moe(**batch, labels=labels)
        torch.testing.assert_close(mean.logits[:, 0], scores.mean(1))
        torch.testing.assert_close(mean.loss, (scores.mean(1) - labels).square().mean())
        assert moe(**batch, return_dict=False)[0].shape == (5, 1)
        one = {key: value[:1] for key, value in batch.items()}
        torch.testing.assert_close(moe.member_scores(**one), scores[:1])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_equal_a_loop_over_members(setting, checkpointing):
    moe, batch = mixture(setting=setting).double().train(), batch_of()
    weights = torch.randn(5, 1, dtype=torch.double)

    def gradients(run):
        moe.zero_grad()
        (run(moe, batch, GROUPS) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    expected = gradients(looped)
    if checkpointing:
        moe.gradient_checkpointing_enable()
    got = gradients(lambda model, inputs, groups: model(**inputs, groups=groups).logits)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    stacked = [g for name, g in got.items() if ".experts." in name or "expert_weight" in name]
    assert stacked and all(g[1].abs().max() == 0 and g[2].abs().max() > 0 for g in stacked)  # expert 1 had no row


def test_outputs_come_back_in_the_callers_order():
    """Hidden states, attentions and the backbone's own output; 4-D masks and position ids go with their rows."""
    moe, batch = mixture(attn_implementation="eager"), batch_of()
    order = GROUPS.argsort(stable=True)
    ordered = {key: value[order] for key, value in batch.items()}
    settings = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        mixed = moe.model(**batch, **settings, groups=GROUPS)
        straight = moe.model(**ordered, **settings, groups=GROUPS[order])
        assert len(mixed.hidden_states) == 3 and len(mixed.attentions) == 2 and mixed.past_key_values is None
        pairs = [(mixed.last_hidden_state, straight.last_hidden_state)]
        pairs += list(
            zip(mixed.hidden_states + mixed.attentions, straight.hidden_states + straight.attentions, strict=True)
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[order], theirs)
        causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & batch["attention_mask"].bool()[:, None, None]
        causal = torch.zeros(5, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
        positions = torch.arange(9).expand(5, 9) + torch.arange(5)[:, None]
        other = moe.model(batch["input_ids"], causal, positions, groups=GROUPS).last_hidden_state
        plain = moe.model(**batch, position_ids=positions, groups=GROUPS).last_hidden_state
        live = batch["attention_mask"].bool()
        torch.testing.assert_close(other[live], plain[live])


def test_a_cache_keeps_the_callers_order():
    moe = mixture("llama", task="CausalLM")
    ids = torch.randint(3, 60, (3, 6))
    with torch.no_grad():
        ummrm.set_evaluation(moe, 2)
        whole = moe(ids).logits
        first = moe(ids[:, :4], use_cache=True)
        rest = moe(ids[:, 4:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 4:])
        ascending = torch.tensor([0, 1, 1])
        first = moe(ids[:, :4], groups=ascending, use_cache=True)
        with pytest.raises(ValueError, match="ascending order for a call with past_key_values"):
            moe(ids[:, 4:], past_key_values=first.past_key_values, groups=torch.tensor([1, 0, 1]))
        rest = moe(ids[:, 4:], past_key_values=first.past_key_values, groups=ascending).logits
        torch.testing.assert_close(rest, moe(ids, groups=ascending).logits[:, 4:])


def test_generation_is_a_members():
    moe = mixture("llama", task="CausalLM")
    ids = torch.randint(3, 60, (2, 5))
    with pytest.raises(ValueError, match='evaluation="mean" averages.*set_evaluation'):
        moe.generate(ids, max_new_tokens=3)
    ummrm.set_evaluation(moe, 1)
    merged_member = copy.deepcopy(moe)
    out = moe.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 8)
    again = ids
    for _ in range(3):
        with torch.no_grad():
            again = torch.cat([again, merged_member(again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)


def test_compiled_and_under_autocast():
    moe, batch = mixture(setting="all"), batch_of()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch, groups=GROUPS).logits, moe(**batch, groups=GROUPS).logits)
        torch.testing.assert_close(compiled(**batch).logits, moe(**batch).logits)
        with torch.autocast("cpu", torch.bfloat16):
            low = moe(**batch, groups=GROUPS).logits
    torch.testing.assert_close(low.float(), moe(**batch, groups=GROUPS).logits, atol=0.2, rtol=0.1)
    moe.train()
    compiled(**batch, groups=GROUPS).logits.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_layers_below_the_first_experts_run_once_for_all_members():
    moe, batch = mixture(setting="top layer"), batch_of()
    rows = []
    for layer in moe.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out: rows.append(out[0].shape[0]), with_kwargs=True
        )
    moe.member_scores(**batch)
    assert rows == [5, 5 * E]


def test_the_setting_is_saved_with_the_model(tmp_path):
    moe, batch = mixture(setting="shared"), batch_of()
    ummrm.set_evaluation(moe, 3)
    moe.save_pretrained(tmp_path)
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.upcycle_config == UpcycleConfig(
        assignment="sequence", num_shared_experts=1, fixed_shared_weight=0.25, evaluation=3
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, moe(**batch).logits)


# ---- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda moe, b: moe.train()(**b), ValueError, "`groups` must say in training.*both answers of a pair"),
        (lambda moe, b: moe(**b, groups=torch.tensor([0, 1])), ValueError, "each of the 5 sequences, got 2"),
        (lambda moe, b: moe(**b, groups=torch.tensor([0, 1, 2, 3, 4])), IndexError, r"\[0, 4\), got 4"),
        (lambda moe, b: moe(**b, groups=GROUPS.float()), ValueError, "integer tensor"),
        (lambda moe, b: moe(**b, groups=GROUPS.tolist()), ValueError, "got list"),
        (lambda moe, b: moe.model(**b), ValueError, "a UmmLlamaModel gives none by itself; name a member"),
        (lambda moe, b: moe(**b, output_hidden_states=True), ValueError, "`output_hidden_states` must be False"),
        (lambda moe, b: moe(attention_mask=b["attention_mask"]), ValueError, "`input_ids` or `inputs_embeds`"),
    ],
    ids=["none", "too few", "no expert", "floats", "a list", "a backbone's mean", "hidden states", "no tokens"],
)
def test_wrong_groups(call, error, message):
    with pytest.raises(error, match=message):
        call(mixture(), batch_of())


@pytest.mark.parametrize("model_type", ["llama", "opt", "bert"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_groups_that_hold_for_several_calls(model_type, setting):
    """`assign_groups` and `members`, as for any network."""
    moe, batch = mixture(model_type, setting).eval(), batch_of()
    for member, scores in zip(ummrm.members(moe), moe.member_scores(**batch).t(), strict=True):
        torch.testing.assert_close(moe(**batch).logits[:, 0], scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moe.member_scores(**batch)[:, member], scores, rtol=1e-5, atol=1e-6)
    mean = moe(**batch).logits
    torch.testing.assert_close(mean[:, 0], moe.member_scores(**batch).mean(1), rtol=1e-5, atol=1e-6)
    wanted = moe(**batch, groups=GROUPS).logits
    ummrm.assign_groups(moe, GROUPS)
    for mode in (False, True) if model_type == "llama" else (False,):  # others drop out in training
        torch.testing.assert_close(moe.train(mode)(**batch).logits, wanted)
    with pytest.raises(ValueError, match="for each of the 3 sequences, got 5"):
        moe(**{name: value[:3] for name, value in batch.items()})
    moe.eval()
    other = GROUPS.flip(0)
    torch.testing.assert_close(moe(**batch, groups=other).logits, looped(moe, batch, other), rtol=1e-5, atol=1e-6)
    ummrm.assign_groups(moe, None)
    torch.testing.assert_close(moe.eval()(**batch).logits, mean)


def test_member_scores_take_no_groups_and_no_labels():
    moe, batch = mixture(), batch_of()
    assert torch.equal(moe.member_scores(**batch, return_dict=True), moe.member_scores(**batch))
    for name in ("groups", "labels"):
        with pytest.raises(ValueError, match=f"`{name}` must be None where all members score"):
            moe.member_scores(**batch, **{name: GROUPS})


def test_groups_are_refused_where_no_sequence_is_assigned():
    by_token = ummrm.upcycle(tiny_model("llama"), UpcycleConfig())
    with pytest.raises(ValueError, match='`groups` must be None.*assignment="sequence"'):
        by_token(**batch_of(), groups=GROUPS)
    with pytest.raises(TypeError, match="`member_scores` needs.*assignment='token'"):
        by_token.member_scores(**batch_of())
    merging = ummrm.prepare_merge(mixture())
    with pytest.raises(ValueError, match="`groups` must be None"):
        merging(**batch_of(), groups=GROUPS)
    assert not sequence_modules(merging)
    several = ummrm.upcycle(tiny_model("llama", num_labels=3), SETTINGS["ffn"])
    with pytest.raises(ValueError, match="one reward a sequence, got 3 labels"):
        several.member_scores(**batch_of())


def test_what_is_no_row_of_the_batch_goes_through_no_expert():
    """DeBERTa sends its relative positions through the projections of its queries."""
    with pytest.raises(ValueError, match='experts_in="ffn"'):
        mixture("deberta-v2", "linear")
    assert mixture("deberta-v2", "ffn")


@pytest.mark.parametrize(
    ("merging", "message"),
    [
        (ummrm.MergeConfig(shared_share=0.5), "0 for a mixture without shared experts, got 0.5"),
        (ummrm.MergeConfig(learn_shared_share=True), "`learn_shared_share` must be False"),
        (ummrm.MergeConfig(alpha_init="routing"), '`alpha_init` must be "uniform"'),
    ],
    ids=["lambda", "learned lambda", "routing"],
)
def test_a_merge_that_there_is_not(merging, message):
    moe = mixture()
    with pytest.raises(ValueError, match=message):
        ummrm.prepare_merge(moe, merging)
    assert sequence_modules(moe)
