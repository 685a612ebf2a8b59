"""Every family, in every task that it has in transformers: upcycled equals dense, saves, reloads, merges, exports."""

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from tiny_models import (
    ALIKE,
    EACH_TYPE,
    MODEL_TYPES,
    in_tier,
    outputs_of,
    padded_batch,
    perturb_experts,
    reward_class,
    tiny_config,
    tiny_model,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.config import GATES
from ummrm.hf.families import FAMILIES, HF_ACTIVATIONS
from ummrm.hf.registry import stock_classes, umm_class
from ummrm.nn.upcycled_ffn import upcycled_ffns
from ummrm.ops.reference import ACTIVATIONS

STOCK = [(family.model_type, stock) for family in FAMILIES.values() for stock in stock_classes(family)]
CASES = [in_tier(m, stock, id=stock.__name__) for m, stock in STOCK]
# Three families for what combines every family with every setting; the rest of the product is in the full tier.
USUAL = ("llama", "gpt_neox", "bert")
PRODUCT = [in_tier(m, fast=m in USUAL) for m in MODEL_TYPES]
ONE_TASK = [in_tier(m, stock, id=stock.__name__, fast=stock is reward_class(m)) for m, stock in STOCK]
NOT_ALIKE = [m for m in MODEL_TYPES if m not in ALIKE]
TRUTH = {"xglm": torch.float32}  # transformers' own code fails in fp64
# Their reward models have no pooler, their backbones alone have: a hole unless asked for.
NO_POOLER = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet")
SETTINGS = {
    "paper": UpcycleConfig(num_experts=7, num_experts_per_tok=5),
    "fixed, two shared": UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, num_shared_experts=2, gate="fixed", fixed_shared_weight=0.3
    ),
    "complement, three shared, top-1": UpcycleConfig(num_experts=3, num_experts_per_tok=1, num_shared_experts=3),
    "one expert": UpcycleConfig(num_experts=1, num_experts_per_tok=1),
    "fixed, all experts, mlp router": UpcycleConfig(
        num_experts=6, num_experts_per_tok=6, gate="fixed", router="mlp", router_init_std=1.0
    ),
    "every second layer": UpcycleConfig(num_experts=5, num_experts_per_tok=3, layers=2),
}
# Shorter than a sliding window: eager attention in fp64 gives NaN to a token that sees nothing (gemma2).
SHORT_PADDING = (9, 7, 6)
SMALL = UpcycleConfig(num_experts=3, num_experts_per_tok=2, num_shared_experts=2, router_init_std=1.0)


def auto_class(model_type):
    is_reward = "SequenceClassification" in reward_class(model_type).__name__
    return AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM


def assert_same(model, other, batch):
    """Weights bit for bit; outputs up to the rounding that another memory alignment may choose."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    torch.testing.assert_close(outputs_of(model, batch), outputs_of(other, batch), rtol=1e-5, atol=1e-6)


def assert_equal_outputs(moe, dense, batch):
    torch.testing.assert_close(outputs_of(moe, batch), outputs_of(dense, batch), rtol=1e-5, atol=1e-5)


def randomise_alpha(moe):
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if name.endswith("alpha"):
                parameter.normal_()


@pytest.mark.parametrize("num_shared_experts", [1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("model_type", PRODUCT)
@pytest.mark.parametrize("side", ["right", "left"])
def test_upcycled_logits_equal_the_dense_ones(model_type, gate, top_k, num_shared_experts, side):
    config = UpcycleConfig(
        num_experts=5,
        num_experts_per_tok=top_k,
        num_shared_experts=num_shared_experts,
        gate=gate,
        fixed_shared_weight=0.3,
        router_init_std=1.0,
    )
    dense = tiny_model(model_type)
    assert_equal_outputs(ummrm.upcycle(dense, config, copy=True), dense, padded_batch(side=side))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_type", PRODUCT)
def test_upcycled_logits_equal_the_dense_ones_in_other_settings(model_type, setting):
    dense = tiny_model(model_type)
    assert_equal_outputs(ummrm.upcycle(dense, setting, copy=True), dense, padded_batch())


def test_transformers_names_cover_every_activation_and_no_other():
    assert set(HF_ACTIVATIONS.values()) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", HF_ACTIVATIONS)
@pytest.mark.parametrize(("model_type", "field"), [("llama", "hidden_act"), ("gpt2", "activation_function")])
def test_every_activation_in_gated_and_plain_ffns(model_type, field, name):
    dense = tiny_model(model_type, **{field: name})
    assert_equal_outputs(ummrm.upcycle(dense, SMALL, copy=True), dense, padded_batch())


@pytest.mark.parametrize("setting", list(SETTINGS.values())[:3], ids=list(SETTINGS)[:3])
@pytest.mark.parametrize("model_type", PRODUCT)
def test_bf16_error_stays_within_twice_the_dense_models_own(model_type, setting):
    check_bf16(model_type, setting)


@pytest.mark.parametrize("model_type", [in_tier(m) for m in MODEL_TYPES if m not in USUAL])
def test_bf16_error_in_the_papers_setting(model_type):
    check_bf16(model_type, SETTINGS["paper"])


def check_bf16(model_type, setting):
    """On the backbone's hidden states: the error of three rewards would be chance."""
    truth_model = tiny_model(model_type, dtype=TRUTH.get(model_type, torch.float64))
    batch = padded_batch(lengths=SHORT_PADDING)
    truth = outputs_of(truth_model.base_model, batch)
    dense = truth_model.to(torch.bfloat16)
    own = (outputs_of(dense.base_model, batch).double() - truth).norm()
    moe = ummrm.upcycle(dense, setting)
    assert {p.dtype for n, p in moe.named_parameters() if "experts" in n} == {torch.bfloat16}
    assert {p.dtype for n, p in moe.named_parameters() if "router" in n} == {torch.float32}
    error = (outputs_of(moe.base_model, batch).double() - truth).norm()
    assert 0 < own and error <= 2 * own + 1e-3 * truth.norm()


def check_wrapped(moe, family):
    """The names that device_map keeps whole are of all layers, and accelerate's FSDP finds each of them."""
    layers = {type(layer) for layer in family.layer_list(moe.base_model)}
    assert {layer.__name__ for layer in layers} <= set(moe._no_split_modules), "device_map could part a layer"
    for version in (1, 2):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="transformer_based_wrap")
        plugin.set_auto_wrap_policy(moe)  # it stops at a name of which there is no instance
        assert layers <= plugin.auto_wrap_policy.keywords["transformer_layer_cls"]


@pytest.mark.parametrize(("model_type", "stock"), CASES)
def test_every_task_upcycles_and_merges(model_type, stock):
    dense = stock(tiny_config(model_type, num_labels=2 if "QuestionAnswering" in stock.__name__ else 1)).eval()
    batches = [padded_batch(dense, side) for side in ("right", "left")]
    expected = [outputs_of(dense, batch) for batch in batches]
    keys = set(dense.state_dict())
    moe = ummrm.upcycle(dense, SMALL)
    assert type(moe) is umm_class(stock)
    assert isinstance(moe, stock) and not moe.training
    check_wrapped(moe, FAMILIES[model_type])
    for batch, outputs in zip(batches, expected, strict=True):
        torch.testing.assert_close(outputs_of(moe, batch), outputs, rtol=1e-5, atol=1e-5)
        live = int(batch["attention_mask"].sum())
        for ffn in upcycled_ffns(moe).values():
            assert ffn.statistics.tokens_per_expert.sum() == live * SMALL.num_experts_per_tok, "the mask got lost"

    ummrm.prepare_merge(perturb_experts(moe), MergeConfig(alpha_per="projection"))
    check_wrapped(moe, FAMILIES[model_type])
    randomise_alpha(moe)
    during, merged = outputs_of(moe, batches[0]), ummrm.merge(moe)
    assert type(merged) is stock
    assert set(merged.state_dict()) == keys
    torch.testing.assert_close(outputs_of(merged, batches[0]), during, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(during, expected[0], rtol=1e-4, atol=1e-4)  # 1e-3 was seen, of random experts


@pytest.mark.parametrize(("model_type", "stock"), ONE_TASK)
def test_every_folder_saves_sharded_and_reloads(model_type, stock, tmp_path):
    labels = {"num_labels": 2} if "QuestionAnswering" in stock.__name__ else {}
    eager = {"attn_implementation": "eager"} if model_type == "falcon" else {}  # falcon's can't be set afterwards
    dense = stock(tiny_config(model_type, **labels, **eager)).eval()
    dense.set_attn_implementation("eager")
    batch = padded_batch(dense)

    def save(model, name):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1

    moe = perturb_experts(ummrm.upcycle(dense, SMALL))
    assert moe.config._attn_implementation == "eager" == moe.base_model.config._attn_implementation
    save(moe, "moe")
    assert_same(umm_class(stock).from_pretrained(tmp_path / "moe", attn_implementation="eager"), moe, batch)

    ummrm.prepare_merge(moe, MergeConfig(alpha_per="projection", learn_shared_share=True))
    randomise_alpha(moe)
    save(moe, "merging")
    resumed = umm_class(stock).from_pretrained(tmp_path / "merging", attn_implementation="eager")
    assert_same(resumed, moe, batch)
    learned = [n for n, p in moe.named_parameters() if p.requires_grad]
    assert learned == [n for n, p in resumed.named_parameters() if p.requires_grad]

    merged = ummrm.merge(moe)
    assert merged.config._attn_implementation == "eager"
    save(merged, "merged")
    assert '"umm' not in (tmp_path / "merged" / "config.json").read_text()
    assert_same(stock.from_pretrained(tmp_path / "merged", attn_implementation="eager"), merged, batch)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_bf16_merged_weights_are_bitwise_the_merge_time_weights(model_type, tmp_path):
    moe = perturb_experts(ummrm.upcycle(tiny_model(model_type, dtype=torch.bfloat16), SMALL))
    ummrm.prepare_merge(moe)
    batch = padded_batch(lengths=SHORT_PADDING)
    during = outputs_of(moe.base_model, batch)
    ummrm.merge(moe).save_pretrained(tmp_path / "merged")
    merged = auto_class(model_type).from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    merged.to(torch.bfloat16)  # transformers loads two biases of deberta in fp32, with which it can't run
    for ffn, layer in zip(
        ummrm.merge_coefficients(moe), merged.base_model.get_submodule(FAMILIES[model_type].layers), strict=True
    ):
        exported = FAMILIES[model_type].dense_ffn(layer, merged.config).fused()
        for name, tensor in moe.get_submodule(ffn).merged_tensors().items():
            assert torch.equal(exported[name], tensor)
    own = outputs_of(merged.base_model, batch).double()
    truth = outputs_of(merged.base_model.to(TRUTH.get(model_type, torch.float64)), batch)
    assert (during.double() - truth).norm() <= 2 * (own - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("model_types", [NOT_ALIKE, pytest.param(ALIKE, marks=pytest.mark.full)], ids=["fast", "alike"])
def test_stock_transformers_without_ummrm(model_types, tmp_path):
    """In a process where ummrm cannot be imported: merged folders and pickles load, upcycled ones are a clear error."""
    for model_type in model_types:
        folder = tmp_path / model_type
        moe = perturb_experts(ummrm.upcycle(tiny_model(model_type), SMALL))
        batch = padded_batch()
        moe.save_pretrained(folder / "moe")
        merged = ummrm.merge(ummrm.prepare_merge(moe))
        merged.save_pretrained(folder / "merged")
        torch.save((auto_class(model_type).__name__, batch, outputs_of(merged, batch)), folder / "expected.pt")
        torch.save(merged, folder / "merged.pt")
    script = textwrap.dedent(f"""
        import pathlib, sys, torch, transformers
        sys.modules["ummrm"] = None  # any import of it now fails
        try:
            import ummrm
        except ImportError:
            pass
        else:
            raise AssertionError("ummrm must not be importable here")
        torch.set_num_threads(1)
        folders = sorted(pathlib.Path({str(tmp_path)!r}).iterdir())
        assert len(folders) == {len(model_types)}
        for folder in folders:
            auto, batch, expected = torch.load(folder / "expected.pt")
            auto = getattr(transformers, auto)
            model, info = auto.from_pretrained(folder / "merged", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], (folder.name, info)
            for model in (model, torch.load(folder / "merged.pt", weights_only=False)):
                assert not type(model).__name__.startswith("Umm")
                logits = model(**batch).logits
                logits = logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits
                torch.testing.assert_close(logits.flatten(), expected[:logits.numel()], rtol=1e-5, atol=1e-5)
            try:
                auto.from_pretrained(folder / "moe")
            except ValueError as error:
                assert "umm_" + folder.name in str(error), error
            else:
                raise AssertionError("an upcycled folder must not load without ummrm")
    """)
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_auto_classes_load_upcycled_folders(model_type, tmp_path):
    moe = ummrm.upcycle(tiny_model(model_type), SMALL)
    moe.save_pretrained(tmp_path)
    batch = padded_batch()
    loaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(moe)
    moe.set_attn_implementation("eager")  # older transformers take sdpa for gemma2, which leaves its soft cap out
    assert loaded.config._attn_implementation == "eager" == loaded.base_model.config._attn_implementation
    torch.testing.assert_close(outputs_of(loaded, batch), outputs_of(moe, batch), rtol=1e-5, atol=1e-5)
    asked = {}
    if model_type in NO_POOLER:
        with pytest.raises(ValueError, match="missing: pooler.dense.bias, pooler.dense.weight. Ask for a fresh head"):
            AutoModel.from_pretrained(tmp_path)
        asked = {"new_head": True}
    backbone = AutoModel.from_pretrained(tmp_path, attn_implementation="eager", **asked)
    assert type(backbone) is type(moe.base_model)
    torch.testing.assert_close(
        backbone(**batch).last_hidden_state[batch["attention_mask"].bool()],
        moe.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()],
    )


def language_model(model_type):
    kinds = ("CausalLM", "LMHead", "MaskedLM")
    return next(stock for m, stock in STOCK if m == model_type and any(kind in stock.__name__ for kind in kinds))


# rembert's output embeddings have a width of their own, and are never tied
LANGUAGE_MODELS = [in_tier(m, stock, id=stock.__name__) for m in MODEL_TYPES for stock in [language_model(m)]]


@pytest.mark.parametrize(("model_type", "stock"), LANGUAGE_MODELS)
def test_hidden_states_are_still_recorded(model_type, stock):
    """transformers records outputs by layer class; ours must count as one."""
    dense, batch = stock(tiny_config(model_type)).eval(), padded_batch()
    expected = dense(**batch, output_hidden_states=True).hidden_states
    got = ummrm.upcycle(dense, SMALL)(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) > 2
    live = batch["attention_mask"].bool()
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g[live], e[live], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model_type", "stock"), [case for case in LANGUAGE_MODELS if case.values[0] != "rembert"])
def test_tied_embeddings_stay_tied(model_type, stock, tmp_path):
    dense = stock(tiny_config(model_type, tie_word_embeddings=True, is_decoder=True)).eval()
    if dense.get_output_embeddings().weight is not dense.get_input_embeddings().weight:
        pytest.fail("the stock class ties nothing: this test says nothing")

    def is_tied(model):
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    moe = ummrm.upcycle(dense, SMALL)
    moe.save_pretrained(tmp_path / "moe")
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    merged.save_pretrained(tmp_path / "merged")
    reloaded = [umm_class(stock).from_pretrained(tmp_path / "moe"), stock.from_pretrained(tmp_path / "merged")]
    assert [is_tied(model) for model in (moe, merged, *reloaded)] == [True] * 4


def test_a_fixed_activation_that_is_another_one_is_a_clear_error(monkeypatch):
    """It is the row's own word, which no configuration confirms; the proof does."""
    row = FAMILIES["lfm2"]
    wrong = dataclasses.replace(row, paths=dataclasses.replace(row.paths, activation="gelu_tanh"))
    monkeypatch.setitem(FAMILIES, "lfm2", wrong)
    with pytest.raises(ValueError, match="row of 'lfm2' does not fit this Lfm2ForCausalLM: .*another activation"):
        ummrm.upcycle(tiny_model("lfm2"), SMALL)


def test_an_activation_without_a_kernel_is_a_clear_error():
    dense = tiny_model("llama", hidden_act="mish")
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    with pytest.raises(ValueError, match=r"config.hidden_act must be one of .*silu.*got 'mish'"):
        ummrm.upcycle(dense, UpcycleConfig())
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "field", "value", "message"),
    [
        ("bert", "chunk_size_feed_forward", 4, "must be 0 .* got 4"),
        ("roberta", "chunk_size_feed_forward", 4, "must be 0 .* got 4"),
        ("opt", "layerdrop", 0.1, "must be 0.0 .* got 0.1: a skipped layer has no routing statistics"),
        ("modernbert", "mlp_dropout", 0.1, "must be 0.0 .* got 0.1: it lies between"),
        ("bloom", "slow_but_exact", True, "must be False .* got True: it reads slices"),
        ("openai-gpt", "afn", "relu", "must be 'gelu' .* got 'relu': it has names of its own"),
        ("seed_oss", "residual_dropout", 0.1, "must be 0.0 .* got 0.1: its FFN holds this dropout"),
        ("xglm", "layerdrop", 0.1, "must be 0.0 .* got 0.1: a skipped layer"),
        ("biogpt", "activation_dropout", 0.1, "must be 0.0 .* got 0.1: it lies between"),
        ("convbert", "num_groups", 2, "must be 1 .* got 2: an FFN in groups"),
        ("big_bird", "attention_type", "block_sparse", "must be 'original_full' .* got 'block_sparse'"),
    ],
)
def test_what_a_family_cannot_keep_is_refused(model_type, field, value, message):
    with pytest.raises(ValueError, match=f"config.{field} {message}"):
        ummrm.upcycle(tiny_model(model_type, **{field: value}), UpcycleConfig())
