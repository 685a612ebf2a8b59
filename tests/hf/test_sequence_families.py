"""Assignment by sequence in every family: each row is scored by its member, in any batch; saved, merged and exported.

A member is compared with a dense model that is given its experts by hand. One family in depth is test_sequence.py's.
"""

import copy

import pytest
import torch
from tiny_models import (
    MODEL_TYPES,
    in_tier,
    outputs_of,
    padded_batch,
    perturb_experts,
    reward_class,
    tiny_config,
    tiny_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.hf.families import FAMILIES
from ummrm.hf.registry import stock_classes, umm_class
from ummrm.nn.dense import Projection
from ummrm.nn.merging_ffn import MergingFFN
from ummrm.nn.merging_linear import merging_parts
from ummrm.nn.upcycled_ffn import UpcycledFFN
from ummrm.nn.upcycled_linear import mixture_parts

# Families whose heads or whose ways of passing arguments on differ; the other tasks are in the full tier.
DIFFERENT = ("llama", "gpt2", "falcon", "opt", "bert", "deberta-v2", "modernbert")
CASES = [
    in_tier(m, stock, id=stock.__name__, fast=m in DIFFERENT)
    for m, family in FAMILIES.items()
    for stock in stock_classes(family)
]
DISENTANGLED = ("deberta", "deberta-v2")  # their tiny models have relative attention
ONE_EACH = [in_tier(m, fast=m in DIFFERENT) for m in MODEL_TYPES]


def by_sequence(**options):
    return UpcycleConfig(**{"assignment": "sequence", "num_experts": 3, **options})


KINDS = {
    "all": by_sequence(experts_in="all"),
    "linear": by_sequence(experts_in="linear"),
    "ffn, upper layer": by_sequence(layers=(1,)),
    "ffn": by_sequence(),
    "linear, upper layer": by_sequence(experts_in="linear", layers=(1,)),
}
# Row counts that a size of a model could be taken for: its heads (4), the batch's longest sequence.
BATCHES = {"one": (7,), "heads": (9, 4, 1, 6), "length": (5, 2, 3, 5, 1)}


WITH_HEAD = [m for m in MODEL_TYPES if "SequenceClassification" in reward_class(m).__name__]
# "all" is "linear" and the head
FAST = {
    "all": WITH_HEAD,
    "linear": ("llama", "bert", *(set(MODEL_TYPES) - set(WITH_HEAD))),
    "ffn, upper layer": DIFFERENT,
    "ffn": (),
    "linear, upper layer": ("llama", "bert"),
}
PRODUCT = [
    in_tier(m, kind, fast=m in FAST[kind]) for m in MODEL_TYPES for kind in KINDS if m in WITH_HEAD or kind != "all"
]


def fitting(model_type, config):
    """What a tiny model needs: DeBERTas' linear layers also project relative positions, which are no sequence's."""
    plain = {"relative_attention": False, "pos_att_type": None, "position_biased_input": True}
    return plain if model_type in DISENTANGLED and config.experts_in != "ffn" else {}


def batches(model):
    for lengths, side in zip(BATCHES.values(), ("right", "left", "right"), strict=True):
        yield padded_batch(model, side, lengths)


def rows_of(model, batch, **more):
    """What a model says of each sequence: logits [rows, ...], where they are by token those of live ones alone."""
    with torch.no_grad():
        logits = model(**batch, **more).logits
    live = batch["attention_mask"].bool()
    if logits.shape[: live.dim()] == live.shape:
        logits = logits.masked_fill(~live.reshape(*live.shape, *[1] * (logits.dim() - live.dim())), 0)
    return logits


def dense_member(dense, moe, member):
    """A copy of `dense` that holds one member's experts."""
    made = copy.deepcopy(dense)
    family, layers = moe.family, moe.family.layer_list(made.base_model)
    for name, part in mixture_parts(moe).items():
        if isinstance(part, UpcycledFFN):
            index = int(name.removesuffix(f".{family.site}").rpartition(".")[2])
            held = {key: tensor[member] for key, tensor in part.experts.tensors().items()}
            family.dense_ffn(layers[index], made.config).write(held)
        else:
            bias = None if part.expert_bias is None else part.expert_bias[member]
            Projection(made.get_submodule(name)).write(part.expert_weight[member], bias)
    return made


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model_type", "kind"), PRODUCT)
def test_every_sequence_is_scored_by_the_member_that_its_group_names(model_type, kind):
    config = KINDS[kind]
    dense = tiny_model(model_type, **fitting(model_type, config))
    moe = ummrm.upcycle(dense, config, copy=True)
    rewards = moe.umm_scores
    for batch in batches(moe):
        expected, count = rows_of(dense, batch), len(batch["input_ids"])
        close(rows_of(moe, batch, groups=torch.randint(3, (count,))), expected)
        if rewards:
            close(rows_of(moe, batch), expected)

    perturb_experts(moe)
    members = [dense_member(dense, moe, member) for member in range(3)]
    apart = 0.0  # over all batches: two members may agree on one sequence by chance
    for batch in batches(moe):
        truth = torch.stack([rows_of(model, batch) for model in members])
        count = truth.shape[1]
        apart = max(apart, (truth[0] - truth[1]).abs().max().item())
        groups = torch.randint(3, (count,))
        close(rows_of(moe, batch, groups=groups), truth[groups, torch.arange(count)])
        if rewards:
            with torch.no_grad():
                close(moe.member_scores(**batch), truth.squeeze(-1).t())
            close(rows_of(moe, batch), truth.mean(0))
        ummrm.set_evaluation(moe, 2)
        close(rows_of(moe, batch), truth[2])
        ummrm.set_evaluation(moe, "mean")
    assert apart > 1e-3


def perturbed(model_type, config, task=None, **overrides):
    """A mixture, and the dense models that its members are."""
    dense = tiny_model(model_type, task, **overrides)
    moe = perturb_experts(ummrm.upcycle(dense, config, copy=True))
    return moe, [dense_member(dense, moe, member) for member in range(config.num_experts)]


@pytest.mark.parametrize("lengths", [(7,), (7, 4)], ids=len)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_position_biases_of_the_attention_go_with_their_rows(implementation, lengths):
    overrides = {"alibi": True, "attn_implementation": implementation}
    moe, members = perturbed("falcon", KINDS["ffn, upper layer"], **overrides)
    batch = padded_batch(lengths=lengths)
    with torch.no_grad():
        close(moe.member_scores(**batch), torch.cat([rows_of(model, batch) for model in members], 1))


def test_one_sequence_is_scored_where_no_padding_token_is_known():
    """As by a stock model, which refuses more of them."""
    moe, members = perturbed("gpt2", KINDS["ffn"], pad_token_id=None)
    ids = torch.randint(3, 50, (2, 7))
    expected = torch.cat([model(ids[:1]).logits for model in members], 1)
    close(moe.member_scores(ids[:1]), expected)
    close(moe(ids[:1]).logits, expected.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="no padding token"):
        moe(ids)


def test_what_is_attended_to_in_another_model_goes_with_its_rows():
    overrides = {"is_decoder": True, "add_cross_attention": True}
    moe, members = perturbed("bert", KINDS["ffn"], "LMHeadModel", **overrides)
    batch, groups = padded_batch(lengths=(9, 4, 1, 6)), torch.tensor([2, 0, 1, 0])
    batch |= {"encoder_hidden_states": torch.randn(4, 5, 24), "encoder_attention_mask": torch.rand(4, 5) < 0.7}
    batch["encoder_attention_mask"][:, 0] = True
    truth = torch.stack([rows_of(model, batch) for model in members])
    close(rows_of(moe, batch, groups=groups), truth[groups, torch.arange(4)])


@pytest.mark.parametrize(("model_type", "stock"), CASES)
def test_every_task_upcycles_and_merges(model_type, stock):
    config = by_sequence(experts_in="ffn" if model_type in DISENTANGLED else "linear", evaluation=1)
    dense = stock(tiny_config(model_type, num_labels=2 if "QuestionAnswering" in stock.__name__ else 1)).eval()
    sides = [padded_batch(dense, side) for side in ("right", "left")]
    expected, keys = [outputs_of(dense, batch) for batch in sides], set(dense.state_dict())
    moe = perturb_experts(ummrm.upcycle(dense, config, copy=True))
    assert type(moe) is umm_class(stock)
    choices = 2 if "MultipleChoice" in stock.__name__ else 1  # the backbone's rows
    groups = torch.tensor([1, 0, 1]).repeat_interleave(choices)
    member, merged = dense_member(dense, moe, 1), ummrm.merge(moe)
    for batch, at_upcycling in zip(sides, expected, strict=True):
        got = outputs_of(moe, batch)
        close(got, outputs_of(member, batch))
        assert not torch.allclose(got, at_upcycling, rtol=1e-3, atol=1e-3)
        close(outputs_of(moe, {**batch, "groups": torch.ones_like(groups)}), got)
    if hasattr(moe(**sides[0]), "logits"):
        mixed, zeroth = rows_of(moe, sides[0], groups=groups), dense_member(dense, moe, 0)
        close(mixed[0], rows_of(member, sides[0])[0])
        close(mixed[1], rows_of(zeroth, sides[0])[1])

    assert type(merged) is stock and set(merged.state_dict()) == keys
    ummrm.prepare_merge(moe)
    close(outputs_of(merged, sides[0]), outputs_of(moe, sides[0]))


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and type(model) is type(other)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def auto_class(model_type):
    return AutoModelForSequenceClassification if model_type in WITH_HEAD else AutoModelForCausalLM


@pytest.mark.parametrize("model_type", ONE_EACH)
def test_every_folder_reloads_and_merged_weights_are_bitwise_the_merge_times(model_type, tmp_path):
    """In bf16, sharded, in both phases and merged, with shared experts where experts are FFNs alone."""
    linear = {"experts_in": "all" if model_type in WITH_HEAD else "linear", "layers": (1,)}
    config = by_sequence(**({"num_shared_experts": 2} if model_type in DISENTANGLED else linear), evaluation=2)
    eager = {"attn_implementation": "eager"}
    dense = tiny_model(model_type, dtype=torch.bfloat16, **(eager if model_type == "falcon" else {}))
    dense.set_attn_implementation("eager")
    moe = perturb_experts(ummrm.upcycle(dense, config))

    def reloaded(model, name):
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        return auto_class(model_type).from_pretrained(tmp_path / name, **eager)

    mixture = reloaded(moe, "moe")
    assert_same(mixture, moe)
    assert mixture.config.upcycle_config == config
    ummrm.prepare_merge(moe, MergeConfig(alpha_per="projection"))
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if name.endswith("alpha"):
                parameter.normal_()
    resumed = reloaded(moe, "merging")
    assert_same(resumed, moe)
    learned = [n for n, p in moe.named_parameters() if p.requires_grad]
    assert learned == [n for n, p in resumed.named_parameters() if p.requires_grad] and learned

    merged = reloaded(ummrm.merge(moe), "merged")
    assert type(merged) is reward_class(model_type) and merged.dtype == torch.bfloat16
    assert '"umm' not in (tmp_path / "merged" / "config.json").read_text()
    family = moe.family
    layers = family.layer_list(merged.base_model)
    for name, part in merging_parts(moe).items():
        if isinstance(part, MergingFFN):
            index = int(name.removesuffix(f".{family.site}").rpartition(".")[2])
            exported = family.dense_ffn(layers[index], merged.config).fused()
        else:
            linear = Projection(merged.get_submodule(name))
            exported = {"weight": linear.weight, "bias": linear.bias}
        for key, tensor in part.merged_tensors().items():
            assert torch.equal(exported[key], tensor), (name, key)


def language_model(model_type):
    kinds = ("CausalLM", "LMHead", "MaskedLM")
    return next(c for c in stock_classes(FAMILIES[model_type]) if any(kind in c.__name__ for kind in kinds))


@pytest.mark.parametrize("model_type", ONE_EACH)
def test_hidden_states_come_out_in_the_callers_order_and_tied_embeddings_stay_tied(model_type, tmp_path):
    stock = language_model(model_type)
    dense = stock(tiny_config(model_type, tie_word_embeddings=True, is_decoder=True)).eval()
    config = by_sequence(experts_in="ffn" if model_type in DISENTANGLED else "linear")
    moe, batch = ummrm.upcycle(dense, config, copy=True), padded_batch(lengths=(9, 4, 7))
    live, groups = batch["attention_mask"].bool(), {"groups": torch.tensor([2, 0, 1])}
    with torch.no_grad():
        expected = dense(**batch, output_hidden_states=True).hidden_states
        got = moe(**batch, output_hidden_states=True, **groups).hidden_states
    assert len(got) == len(expected) > 2
    for ours, theirs in zip(got, expected, strict=True):
        close(ours[live], theirs[live])

    perturb_experts(moe).save_pretrained(tmp_path / "moe")
    merged = ummrm.merge(moe)
    merged.save_pretrained(tmp_path / "merged")
    models = [
        moe,
        umm_class(stock).from_pretrained(tmp_path / "moe"),
        merged,
        stock.from_pretrained(tmp_path / "merged"),
    ]
    close(rows_of(models[1], batch, **groups), rows_of(moe, batch, **groups))
    close(rows_of(models[3], batch), rows_of(merged, batch))
    if model_type == "rembert":  # its output embeddings have a width of their own, and are never tied
        return
    assert [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in models] == [True] * 4


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_groups_are_refused_by_what_is_no_mixture_by_sequence(model_type):
    """By backbones as by heads; OPT's is called with them on the way to its decoder."""
    batch, groups = padded_batch(), torch.tensor([2, 0, 1])
    by_token = ummrm.upcycle(tiny_model(model_type), UpcycleConfig(num_experts=3, num_experts_per_tok=2))
    for model in (by_token, ummrm.prepare_merge(ummrm.upcycle(tiny_model(model_type), KINDS["ffn"]))):
        for part in (model, model.base_model):
            with pytest.raises(
                ValueError, match="`groups` must be None for a model that is no mixture assigned by seq"
            ):
                part(**batch, groups=groups)
