"""Upcycling proves a family's row on the model, layer by layer, before the dense model loses anything."""

import copy
import dataclasses
import sys

import pytest
import torch
from tiny_models import outputs_of, padded_batch, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import Family, FFNPaths, UpcycleConfig
from ummrm.hf import proof
from ummrm.hf.families import FAMILIES, REGISTERED
from ummrm.nn.dense import DenseFFN
from ummrm.nn.upcycled_ffn import upcycled_ffns

CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2)


def prelayernorm(dtype=torch.float32):
    """A BERT with a norm inside the module that bert's row bypasses."""
    sizes = {name: getattr(tiny_config("roberta"), name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    config = type(tiny_config("roberta-prelayernorm"))(
        **sizes, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0, num_labels=1, initializer_range=0.2
    )
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.to(dtype).eval()


def assert_untouched(dense, batch, before, outputs):
    after = dict(dense.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    assert torch.equal(outputs_of(dense, batch), outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_a_bypassed_norm_is_found_before_anything_is_taken_over(monkeypatch, dtype, keep):
    row = dataclasses.replace(FAMILIES["roberta"], model_type="roberta-prelayernorm")
    monkeypatch.setitem(REGISTERED, row.model_type, row)
    dense, batch = prelayernorm(dtype), padded_batch()
    dense.base_model.encoder.layer[1].attention.train()
    modes = [m.training for m in dense.modules()]
    before = dict(dense.named_parameters())
    dense.eval()
    outputs = outputs_of(dense, batch)
    for module, mode in zip(dense.modules(), modes, strict=True):
        module.training = mode
    with pytest.raises(
        ValueError,
        match="row of 'roberta-prelayernorm' does not fit this RobertaPreLayerNormForSequenceClassification: "
        r"encoder.layer.0.output.dense, upcycled, is off by .* more in intermediate than the activation \(a norm",
    ):
        ummrm.upcycle(dense, CONFIG, copy=keep)
    assert [m.training for m in dense.modules()] == modes
    assert_untouched(dense.eval(), batch, before, outputs)


class Scaled(nn.Linear):
    """A linear map that does more than its weight says."""

    def forward(self, x):
        return 1.5 * super().forward(x)


def scale_up_projection(dense):
    layer = dense.base_model.decoder.layers[1]
    layer.fc1.__class__ = Scaled


def swap_activation(dense):
    dense.base_model.decoder.layers[1].activation_fn = nn.SiLU()


def drop_inside(dense):
    dense.base_model.decoder.layers[1].activation_fn = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))


def norm_after_the_layer(dense):
    layer = dense.base_model.decoder.layers[1]
    layer.register_forward_hook(lambda module, args, output: 2 * output if torch.is_tensor(output) else output)


def missing_part(dense):
    del dense.base_model.decoder.layers[1].activation_fn


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (scale_up_projection, r"decoder.layers.1.fc2, upcycled, is off by .* more in fc1, activation_fn than"),
        (swap_activation, r"decoder.layers.1.fc2, upcycled, is off by"),
        (drop_inside, r"decoder.layers.1.activation_fn is bypassed and holds an active dropout, which would be lost"),
        (norm_after_the_layer, r"decoder.layers.1, upcycled, is off by"),
        (missing_part, r"decoder.layers.1 has no 'activation_fn'"),
    ],
)
def test_the_error_names_the_layer_and_module_that_differs(alter, message):
    dense, batch = tiny_model("opt"), padded_batch()
    alter(dense)
    before = dict(dense.named_parameters())
    with pytest.raises(ValueError, match=f"row of 'opt' does not fit this OPTForSequenceClassification: {message}"):
        ummrm.upcycle(dense, CONFIG)
    assert dict(dense.named_parameters()).keys() == before.keys()
    moe = ummrm.upcycle(dense, dataclasses.replace(CONFIG, layers=(0,)))
    assert list(upcycled_ffns(moe)) == ["model.decoder.layers.0.fc2"], "a layer that is left alone needs no proof"
    if alter is not missing_part:
        assert torch.isfinite(outputs_of(moe, batch)).all()


def test_a_layer_that_is_not_built_from_its_configuration_is_found():
    """What was changed on the object alone is lost in ours and in the merged model."""
    dense = tiny_model("gpt2")
    dense.transformer.h[1].ln_2.eps = 10.0
    with pytest.raises(ValueError, match=r"h.1.mlp.c_proj, upcycled, is off by"):
        ummrm.upcycle(dense, CONFIG)


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "bert"])
def test_the_way_back_is_proven_too(model_type, monkeypatch):
    """As if the merge's writing did not fit a layer: transposed, halves exchanged, a bias forgotten."""
    write = DenseFFN.write
    monkeypatch.setattr(DenseFFN, "write", lambda ffn, tensors: write(ffn, {n: t.flip(0) for n, t in tensors.items()}))
    with pytest.raises(ValueError, match=r"0, merged back into a stock layer, is off by"):
        ummrm.upcycle(tiny_model(model_type), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "blocks"}, "its backbone has no 'blocks'"),
        ({"layers": "norm"}, "`layers` names 'norm', a ArceeRMSNorm, and must be the list of layers"),
        ({"site": "ffn"}, r"layers.0 has no 'ffn'"),
        ({"site": "self_attn"}, "a forward of the upcycled model on a tiny batch fails at or before layers.0"),
        ({"masked": "norm"}, "`masked` names 'norm', a ArceeRMSNorm, .*must be a model of its own"),
        ({"masked": "decoder"}, "its backbone has no 'decoder'"),
    ],
)
def test_a_row_with_wrong_paths_is_a_clear_error(monkeypatch, change, message):
    row = Family("arcee", FFNPaths(up="mlp.up_proj", down="mlp.down_proj"))
    monkeypatch.setitem(REGISTERED, "arcee", dataclasses.replace(row, **change))
    dense = AutoModelForSequenceClassification.from_config(tiny_config("arcee")).eval()
    before = dict(dense.named_parameters())
    with pytest.raises(ValueError, match=message):
        ummrm.upcycle(dense, CONFIG)
    assert all(dict(dense.named_parameters())[n] is p for n, p in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_in_any_layer(value):
    dense = tiny_model("gpt2")
    with torch.no_grad():
        dense.transformer.h[1].mlp.c_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match="finite weights, got 1 of 1056 NaN or infinite in h.1.mlp.c_proj.weight"):
        ummrm.upcycle(dense, CONFIG)
    dense = tiny_model("gpt2")
    with torch.no_grad():
        dense.transformer.wte.weight.fill_(value)
    with pytest.raises(ValueError, match="finite numbers, and has none at h.0.*wte.weight holds NaN or infinite"):
        ummrm.upcycle(dense, CONFIG)
    large = tiny_model("gpt2")
    with torch.no_grad():
        large.transformer.h[0].mlp.c_proj.weight.fill_(3e38)  # finite, though their sum is not in fp32
    proof._check_finite(FAMILIES["gpt2"], large, 0)


def test_noise_is_added_after_the_proof_and_drawn_as_without_it():
    dense = tiny_model("llama")
    noisy = UpcycleConfig(num_experts=3, num_experts_per_tok=2, expert_noise=0.5)
    torch.manual_seed(5)
    first = ummrm.upcycle(copy.deepcopy(dense), noisy)
    torch.manual_seed(5)
    ffn = ummrm.UpcycledFFN.from_dense(copy.deepcopy(dense.model.layers[0].mlp), noisy)
    ours = first.model.layers[0].mlp
    assert (ours.experts.down_proj[0] - ours.experts.down_proj[1]).abs().max() > 0.01
    torch.testing.assert_close(ours.experts.down_proj.std(), ffn.experts.down_proj.std(), rtol=0.1, atol=0)
    torch.manual_seed(5)
    again = ummrm.upcycle(dense, noisy, copy=True).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.state_dict().items())


def test_the_proof_leaves_no_trace_and_copies_nothing(monkeypatch):
    dense = tiny_model("llama", task="ForCausalLM").train()
    seen = {}

    def prove(dense, moe, stock, indices):
        kept = {n: p for n, p in moe.named_parameters() if ".mlp." not in n}
        seen["shared"] = all(dict(dense.named_parameters())[n] is p for n, p in kept.items())
        state = torch.get_rng_state()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            original(dense, moe, stock, indices)
        seen["random"] = torch.equal(torch.get_rng_state(), state)
        seen["meta"] = {n for n, p in stock.named_parameters() if p.is_meta} == {
            n for n, _ in stock.named_parameters() if ".mlp." in n
        }

    original = proof.prove_layers
    monkeypatch.setattr(sys.modules["ummrm.upcycle"], "prove_layers", prove)
    moe = ummrm.upcycle(dense, CONFIG)
    assert seen == {"shared": True, "random": True, "meta": True}
    assert moe.training and all(m.training for m in moe.modules())
    assert all(ffn.statistics is None and ffn.token_mask is None for ffn in upcycled_ffns(moe).values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in moe.modules())
