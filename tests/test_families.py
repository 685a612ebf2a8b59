"""Every family, in every task that it has in transformers: upcycled equals dense, saves, reloads, merges, exports."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.config import GATES
from ummrm.families import FAMILIES, find_family
from ummrm.modeling import stock_classes, umm_class


def assert_same(model, other, batch):
    """Weights bit for bit; outputs up to the rounding that another memory alignment may choose."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    torch.testing.assert_close(outputs_of(model, batch), outputs_of(other, batch), rtol=1e-5, atol=1e-6)


CASES = [(family.model_type, stock) for family in FAMILIES.values() for stock in stock_classes(family)]
IDS = [stock.__name__ for _, stock in CASES]
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


@pytest.mark.parametrize("num_shared_experts", [1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("model_type", FAMILIES)
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
    dense, batch = tiny_model(model_type), padded_batch(side=side)
    moe = ummrm.upcycle(dense, config, copy=True)
    torch.testing.assert_close(outputs_of(moe, batch), outputs_of(dense, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_upcycled_logits_equal_the_dense_ones_in_other_settings(model_type, setting):
    dense, batch = tiny_model(model_type), padded_batch()
    moe = ummrm.upcycle(dense, setting, copy=True)
    torch.testing.assert_close(outputs_of(moe, batch), outputs_of(dense, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", list(SETTINGS.values())[:3], ids=list(SETTINGS)[:3])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_bf16_error_stays_within_twice_the_dense_models_own(model_type, setting):
    truth_model = tiny_model(model_type, dtype=torch.float64)
    batch = padded_batch()
    truth = outputs_of(truth_model, batch)
    dense = truth_model.to(torch.bfloat16)
    own = (outputs_of(dense, batch).double() - truth).norm()
    moe = ummrm.upcycle(dense, setting)
    assert {p.dtype for n, p in moe.named_parameters() if "experts" in n} == {torch.bfloat16}
    assert {p.dtype for n, p in moe.named_parameters() if "router" in n} == {torch.float32}
    error = (outputs_of(moe, batch).double() - truth).norm()
    assert 0 < own and error <= 2 * own + 1e-3 * truth.norm()


@pytest.mark.parametrize(("model_type", "stock"), CASES, ids=IDS)
def test_every_task_upcycles_saves_reloads_merges_and_exports(model_type, stock, tmp_path):
    dense = stock(tiny_config(model_type, num_labels=2 if "QuestionAnswering" in stock.__name__ else 1)).eval()
    batch = padded_batch(dense)
    expected = outputs_of(dense, batch)
    keys = set(dense.state_dict())
    config = UpcycleConfig(num_experts=3, num_experts_per_tok=2, num_shared_experts=2)

    moe = ummrm.upcycle(dense, config)
    assert type(moe) is umm_class(stock)
    assert isinstance(moe, stock) and not moe.training
    torch.testing.assert_close(outputs_of(moe, batch), expected, rtol=1e-5, atol=1e-5)

    perturb_experts(moe)
    moe.save_pretrained(tmp_path / "moe")
    reloaded = umm_class(stock).from_pretrained(tmp_path / "moe")
    assert_same(reloaded, moe, batch)

    ummrm.prepare_merge(moe, MergeConfig(alpha_per="projection"))
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if name.endswith("alpha"):
                parameter.normal_()
    during = outputs_of(moe, batch)
    moe.save_pretrained(tmp_path / "merging")
    resumed = umm_class(stock).from_pretrained(tmp_path / "merging")
    assert_same(resumed, moe, batch)
    assert [n for n, p in resumed.named_parameters() if p.requires_grad] == [
        n for n, p in moe.named_parameters() if p.requires_grad
    ]

    merged = ummrm.merge(moe)
    assert type(merged) is stock
    assert set(merged.state_dict()) == keys
    torch.testing.assert_close(outputs_of(merged, batch), during, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs_of(merged, batch), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert "umm" not in (tmp_path / "merged" / "config.json").read_text()
    assert_same(stock.from_pretrained(tmp_path / "merged"), merged, batch)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bf16_merged_weights_are_bitwise_the_merge_time_weights(model_type, tmp_path):
    moe = perturb_experts(ummrm.upcycle(tiny_model(model_type, dtype=torch.bfloat16), SETTINGS["paper"]))
    ummrm.prepare_merge(moe)
    batch = padded_batch()
    during = outputs_of(moe, batch)
    ummrm.merge(moe).save_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    for ffn, layer in zip(
        ummrm.merge_coefficients(moe), merged.base_model.get_submodule(FAMILIES[model_type].layers), strict=True
    ):
        exported = FAMILIES[model_type].dense_ffn(layer, merged.config).fused()
        for name, tensor in moe.get_submodule(ffn).merged_tensors().items():
            assert torch.equal(exported[name], tensor)
    own = outputs_of(merged, batch).double()
    truth = outputs_of(merged.double(), batch)
    assert (during.double() - truth).norm() <= 2 * (own - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stock_transformers_without_ummrm(model_type, tmp_path):
    """In a process where ummrm cannot be imported: the merged folder loads, the upcycled one is a clear error."""
    moe = perturb_experts(ummrm.upcycle(tiny_model(model_type), SETTINGS["paper"]))
    batch = padded_batch()
    moe.save_pretrained(tmp_path / "moe")
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    merged.save_pretrained(tmp_path / "merged")
    torch.save((batch, outputs_of(merged, batch)), tmp_path / "expected.pt")
    script = textwrap.dedent(f"""
        import sys, torch
        sys.modules["ummrm"] = None  # any import of it now fails
        from transformers import AutoModelForSequenceClassification as Auto
        try:
            import ummrm
        except ImportError:
            pass
        else:
            raise AssertionError("ummrm must not be importable here")
        batch, expected = torch.load({str(tmp_path / "expected.pt")!r})
        model, info = Auto.from_pretrained({str(tmp_path / "merged")!r}, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        torch.testing.assert_close(model(**batch).logits.flatten(), expected, rtol=1e-5, atol=1e-6)
        try:
            Auto.from_pretrained({str(tmp_path / "moe")!r})
        except ValueError as error:
            assert "umm_{model_type}" in str(error), error
        else:
            raise AssertionError("an upcycled folder must not load without ummrm")
    """)
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", FAMILIES)
def test_auto_classes_load_upcycled_folders(model_type, tmp_path):
    moe = ummrm.upcycle(tiny_model(model_type), SETTINGS["paper"])
    moe.save_pretrained(tmp_path)
    batch = padded_batch()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(moe)
    assert loaded.config._attn_implementation == "eager" == loaded.base_model.config._attn_implementation
    torch.testing.assert_close(outputs_of(loaded, batch), outputs_of(moe, batch), rtol=1e-5, atol=1e-5)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is type(moe.base_model)
    torch.testing.assert_close(
        backbone(**batch).last_hidden_state[batch["attention_mask"].bool()],
        moe.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()],
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_attention_implementation_survives_upcycling_and_merging(model_type):
    dense = tiny_model(model_type)
    dense.set_attn_implementation("eager")
    moe = ummrm.upcycle(dense, SETTINGS["paper"])
    assert moe.config._attn_implementation == "eager" == moe.base_model.config._attn_implementation
    assert ummrm.merge(ummrm.prepare_merge(moe)).config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_legacy_rotary_keys_are_written(model_type, tmp_path):
    """transformers 4 reads only these; without them it falls back to theta 10000 and scores differently."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    if model_type == "gpt_neox":
        rope["partial_rotary_factor"] = 0.5
    moe = ummrm.upcycle(tiny_model(model_type, rope_parameters=rope), SETTINGS["paper"])
    ummrm.merge(ummrm.prepare_merge(moe)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    if model_type == "gpt_neox":
        assert (written["rotary_emb_base"], written["rotary_pct"]) == (5e5, 0.5)
    else:
        assert written["rope_theta"] == 5e5
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {k: reloaded.config.rope_parameters[k] for k in rope} == rope


def test_scaled_rotary_embeddings_keep_their_scaling(tmp_path):
    """transformers 4 reads `rope_scaling`; transformers 5 must read the same from it as from `rope_parameters`."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    batch = padded_batch()
    merged = ummrm.merge(ummrm.prepare_merge(ummrm.upcycle(tiny_model("llama", rope_parameters=rope), UpcycleConfig())))
    merged.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path), merged, batch)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_are_still_recorded(model_type):
    """transformers records outputs by layer class; ours must count as one."""
    dense, batch = tiny_model(model_type), padded_batch()
    expected = dense(**batch, output_hidden_states=True).hidden_states
    got = ummrm.upcycle(dense, SETTINGS["paper"])(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(expected)
    live = batch["attention_mask"].bool()
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g[live], e[live], rtol=1e-5, atol=1e-5)


def test_unknown_families_are_a_clear_error():
    with pytest.raises(ValueError, match=r"no family for model_type 'mamba'.*llama.*from_dense"):
        find_family("mamba")


def test_an_activation_without_a_kernel_is_a_clear_error():
    dense = tiny_model("llama", hidden_act="mish")
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    with pytest.raises(ValueError, match=r"config.hidden_act must be one of .*silu.*got 'mish'"):
        ummrm.upcycle(dense, UpcycleConfig())
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_bert_with_chunked_ffn_is_refused():
    with pytest.raises(ValueError, match="config.chunk_size_feed_forward must be 0 .* got 4"):
        ummrm.upcycle(tiny_model("bert", chunk_size_feed_forward=4), UpcycleConfig())
