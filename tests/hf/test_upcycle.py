"""Upcycling a model: what moves, what is copied, what is refused, and that a refusal changes nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import outputs_of, padded_batch, tiny_config, tiny_model
from torch import nn
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.modeling import UmmLlamaForSequenceClassification, UmmLlamaModel
from ummrm.hf.registry import upcycled_config

CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2)


def test_tensors_are_taken_over_and_the_dense_model_becomes_a_clear_error():
    dense = tiny_model("llama")
    kept = {n: p for n, p in dense.named_parameters() if ".mlp." not in n}
    moe = ummrm.upcycle(dense, CONFIG)
    ours = dict(moe.named_parameters())
    assert kept and all(ours[n] is p for n, p in kept.items())
    for use in (
        lambda: dense(**padded_batch()),
        lambda: dense.state_dict(),
        lambda: dense.config,
        lambda: dense.to("cpu"),
    ):
        with pytest.raises(RuntimeError, match=r"taken over by ummrm.upcycle.*copy=True"):
            use()
    with pytest.raises(ValueError, match="upcycled already and its tensors taken over"):
        ummrm.upcycle(dense, CONFIG)
    assert "ConsumedModel" in repr(dense)


def test_copy_keeps_the_dense_model():
    dense, batch = tiny_model("llama"), padded_batch()
    expected = outputs_of(dense, batch)
    moe = ummrm.upcycle(dense, CONFIG, copy=True)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert torch.equal(outputs_of(dense, batch), expected)


@pytest.mark.parametrize("keep", [True, False])
def test_ties_modes_and_requires_grad_are_kept(keep):
    dense = LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=True))
    dense.model.norm.weight.requires_grad_(False)
    dense.model.layers[0].self_attn.eval()
    moe = ummrm.upcycle(dense, CONFIG, copy=keep)
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    assert not moe.model.norm.weight.requires_grad and moe.model.layers[0].input_layernorm.weight.requires_grad
    assert moe.training and moe.model.layers[0].mlp.experts.training
    assert not moe.model.layers[0].self_attn.training and moe.model.layers[1].self_attn.training
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_gradient_checkpointing_stays_on():
    dense = tiny_model("llama").train()
    dense.gradient_checkpointing_enable()
    moe = ummrm.upcycle(dense, CONFIG)
    assert all(layer.gradient_checkpointing for layer in moe.model.layers)


def test_only_the_chosen_layers_are_upcycled():
    moe = ummrm.upcycle(tiny_model("llama"), UpcycleConfig(num_experts=3, num_experts_per_tok=2, layers=(1,)))
    assert type(moe.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert type(moe.model.layers[1].mlp).__name__ == "UpcycledFFN"
    assert isinstance(ummrm.merge(ummrm.prepare_merge(moe)), LlamaForSequenceClassification)


def test_mixed_dtypes_are_kept():
    dense = tiny_model("llama", dtype=torch.bfloat16)
    dense.score.float()
    moe = ummrm.upcycle(dense, CONFIG)
    assert moe.score.weight.dtype == torch.float32
    assert moe.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16


class Quantised(LlamaForSequenceClassification):
    hf_quantizer = object()


class WithAdapters(LlamaForSequenceClassification):
    """What transformers' `add_adapter` leaves: the model's own class, and this mark."""

    _hf_peft_config_loaded = True


class AdapterModel(nn.Module):
    """What PEFT's `get_peft_model` returns: a module of its own around the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.peft_config = model, {}


class OnTwoDevices(LlamaForSequenceClassification):
    """Some parameters elsewhere, on a machine that has no such device."""

    def parameters(self, recurse=True):
        yield from super().parameters(recurse)
        yield SimpleNamespace(device="cuda:1")


def off_device():
    dense = tiny_model("llama")
    dense.score.to("meta")
    return dense


REFUSED = [
    (lambda: nn.Linear(3, 3), CONFIG, TypeError, "must be a transformers PreTrainedModel, got Linear.*from_dense"),
    (lambda: tiny_model("llama"), {"num_experts": 3}, TypeError, "`config` must be an UpcycleConfig, got dict"),
    (lambda: ummrm.upcycle(tiny_model("llama"), CONFIG), CONFIG, ValueError, "which is upcycled already"),
    (lambda: Quantised(tiny_config("llama")), CONFIG, ValueError, "must hold plain float weights, got a quantised"),
    (off_device, CONFIG, ValueError, r"1 parameters are on the meta device, first 'score.weight'"),
    (lambda: tiny_model("llama"), UpcycleConfig(layers=(7,)), ValueError, r"`layers` must be indices in \[-2, 1\]"),
    (
        lambda: GPTBigCodeForSequenceClassification(GPTBigCodeConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=10)),
        CONFIG,
        ValueError,
        "no family for model_type 'gpt_bigcode'; ummrm knows .*bert, .*llama",
    ),
    (
        lambda: WithAdapters(tiny_config("llama")),
        CONFIG,
        ValueError,
        "must hold no adapters; merge and unload them before upcycling",
    ),
    (
        lambda: AdapterModel(tiny_model("llama")),
        CONFIG,
        TypeError,
        r"PreTrainedModel, got AdapterModel; merge the adapter first \(merge_and_unload\)",
    ),
    (
        lambda: OnTwoDevices(tiny_config("llama")),
        CONFIG,
        ValueError,
        "must be on one device, got parameters on cpu, cuda:1; load it without device_map",
    ),
]


@pytest.mark.parametrize(("make", "config", "error", "message"), REFUSED)
def test_refusals_are_clear_and_leave_the_model_alone(make, config, error, message):
    dense = make()
    before = dict(dense.named_parameters())
    kind = type(dense)
    with pytest.raises(error, match=message):
        ummrm.upcycle(dense, config)
    assert type(dense) is kind
    after = dict(dense.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())


def test_a_users_own_subclass_is_refused_by_name():
    class Mine(LlamaForSequenceClassification):
        pass

    with pytest.raises(ValueError, match="no upcycled class for Mine; there is one for each of: .*LlamaForCausalLM"):
        ummrm.upcycle(Mine(tiny_config("llama")), CONFIG)


def test_a_dense_folder_is_not_ours(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no `umm` section.*not written by ummrm.*ummrm.upcycle"):
        UmmLlamaForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`config` must be a UmmLlamaConfig .* got a LlamaConfig"):
        UmmLlamaForSequenceClassification(tiny_config("llama"))


def test_an_incomplete_folder_is_an_error_not_a_random_model(tmp_path):
    moe = ummrm.upcycle(tiny_model("llama"), CONFIG)
    state = moe.state_dict()
    del state["model.layers.1.mlp.experts.down_proj"]
    moe.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.experts.down_proj\."):
        UmmLlamaForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"num_experts": 0}, "`num_experts` must be"),
        ({"what": 1}, r"unknown field\(s\) what"),
        (None, "no `umm` section"),
    ],
)
def test_malformed_sections_are_refused(section, message):
    config = upcycled_config(tiny_config("llama"), CONFIG)
    config.umm = section
    with pytest.raises(ValueError, match=message):
        UmmLlamaModel(config)


def test_a_model_from_its_config_alone_is_random_and_runs():
    torch.manual_seed(0)
    config = upcycled_config(tiny_config("llama"), CONFIG)
    model = UmmLlamaForSequenceClassification(copy.deepcopy(config))
    assert torch.isfinite(outputs_of(model, padded_batch())).all()
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert 0.15 < experts.std() < 0.25  # initializer_range of the tiny configuration
    assert 0.015 < model.model.layers[0].mlp.router.weight.std() < 0.025


def test_generation_with_a_cache_equals_generation_without():
    """With a cache the attention mask is longer than the input; the token mask must be its end."""
    torch.manual_seed(0)
    moe = ummrm.upcycle(LlamaForCausalLM(tiny_config("llama")).eval(), CONFIG)
    batch = padded_batch(side="left")
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = moe.generate(**batch, use_cache=True, **kwargs)
    assert torch.equal(cached, moe.generate(**batch, use_cache=False, **kwargs))


def test_a_gradient_penalty_is_the_dense_models():
    """A new mixture computes what the dense model does, so its second derivatives are the dense model's as well."""
    dense, batch = tiny_model("llama").double(), padded_batch()
    dense.set_attn_implementation("eager")  # torch's fused attention has no second derivative
    embeddings = dense.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight", "score.weight"]

    def penalty(model):
        reward = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits.sum()
        (gradient,) = torch.autograd.grad(reward, embeddings, create_graph=True)
        value, parameters = gradient.square().sum(), dict(model.named_parameters())
        return value, *torch.autograd.grad(value, [embeddings, *(parameters[n] for n in names)])

    want = penalty(dense)
    for got, expected in zip(penalty(ummrm.upcycle(dense, CONFIG)), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_dropout_that_the_user_switched_off_stays_off():
    dense = tiny_model("bert")
    for module in dense.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    moe = ummrm.upcycle(dense, UpcycleConfig(), copy=True)
    assert {m.p for m in moe.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("kind", ["module", "buffer"])
def test_what_a_user_added_to_a_model_is_never_dropped_without_a_word(kind):
    dense = tiny_model("llama")
    if kind == "module":
        dense.model.layers[1].extra = nn.Linear(4, 4)
    else:
        dense.register_buffer("extra", torch.ones(3))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    name = "model.layers.1.extra.weight" if kind == "module" else "extra"
    with pytest.raises(ValueError, match=f"got another tensor, '{name}', which the upcycled model has no place for"):
        ummrm.upcycle(dense, UpcycleConfig())
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
