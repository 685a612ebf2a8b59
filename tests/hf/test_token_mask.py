"""The token mask in every family: padding is routed nowhere, recomputation has the same mask; and dropout stays."""

import pytest
import torch
from tiny_models import MODEL_TYPES, outputs_of, padded_batch, perturb_experts, reward_class, tiny_config, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.families import FAMILIES
from ummrm.hf.registry import stock_classes
from ummrm.nn.upcycled_ffn import upcycled_ffns

CONFIG = UpcycleConfig(num_experts=4, num_experts_per_tok=2, router_init_std=1.0)


def trainable_moe(model_type, **overrides):
    return perturb_experts(ummrm.upcycle(tiny_model(model_type, **overrides), CONFIG)).train()


def two_batches():
    """As a preference loss runs them: the same shape, other padding."""
    return padded_batch(side="right"), padded_batch(side="left", lengths=(2, 9, 5))


def gradients(moe, batches, auxiliary=True):
    """Gradients of two forwards and one backward, auxiliary losses included, under one seed of dropout."""
    torch.manual_seed(7)
    moe.zero_grad()
    loss = 0
    for batch in batches:
        loss = loss + outputs_of(moe, batch).square().mean()
        loss = loss + ummrm.auxiliary_loss(moe) if auxiliary else loss
    loss.backward()
    return {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}


def slots(moe):
    return {name: ffn.statistics.tokens_per_expert.clone() for name, ffn in upcycled_ffns(moe).items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_checkpointing_recomputes_with_the_same_mask(model_type):
    moe, batches = trainable_moe(model_type), two_batches()
    expected = gradients(moe, batches)
    counted = slots(moe)
    live = int(batches[1]["attention_mask"].sum())
    assert all(int(c.sum()) == live * CONFIG.num_experts_per_tok for c in counted.values())
    moe.gradient_checkpointing_enable()
    got = gradients(moe, batches)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert any(g.abs().max() > 0 for n, g in got.items() if "router" in n)
    assert all(torch.equal(c, counted[name]) for name, c in slots(moe).items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_dropout_stays_where_it_was(model_type):
    """At upcycling the mixture equals the dense model in training mode too: the same seed drops the same values."""
    names = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "residual_dropout", "dropout", "attention_dropout")
    config = tiny_config(model_type)
    dropouts = {name: 0.3 for name in names if hasattr(config, name)}
    assert dropouts
    dense, batch = tiny_model(model_type, **dropouts).train(), padded_batch()
    torch.manual_seed(3)
    expected = outputs_of(dense, batch)
    moe = ummrm.upcycle(dense, CONFIG)
    torch.manual_seed(3)
    torch.testing.assert_close(outputs_of(moe, batch), expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(4)
    assert not torch.allclose(outputs_of(moe, batch), expected, rtol=1e-3, atol=1e-3), "no dropout is active"


GENERATING = ["llama", "gpt2", "opt", "falcon", "phi3", "gemma3_text"]


@pytest.mark.parametrize("model_type", GENERATING)
def test_generation_with_a_cache_equals_generation_without(model_type):
    """With a cache the attention mask is longer than the input; the token mask must be its end."""
    stock = next(c for c in stock_classes(FAMILIES[model_type]) if "CausalLM" in c.__name__ or "LMHead" in c.__name__)
    moe = perturb_experts(ummrm.upcycle(stock(tiny_config(model_type)).eval(), CONFIG))
    batch = padded_batch(side="left")
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = moe.generate(**batch, use_cache=True, **kwargs)
    assert torch.equal(cached, moe.generate(**batch, use_cache=False, **kwargs))


def wrap_layers(moe):
    """Checkpointing as FSDP and others do it: each layer inside a module that calls it anew in backward."""
    layers = set(FAMILIES[moe.family.model_type].layer_list(moe.base_model))
    apply_activation_checkpointing(moe, check_fn=lambda module: module in layers)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "roberta"])
def test_a_checkpointing_wrapper_keeps_a_mask_that_is_an_argument(model_type):
    moe, batches = trainable_moe(model_type, use_cache=False), two_batches()
    expected = gradients(moe, batches)
    wrap_layers(moe)
    for got, want in zip(gradients(moe, batches).values(), expected.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["falcon", "deberta-v2"])
def test_a_checkpointing_wrapper_that_would_lose_the_mask_is_an_error(model_type):
    moe = trainable_moe(model_type)
    wrap_layers(moe)
    with pytest.raises(RuntimeError, match="without its token mask; checkpoint with model.gradient_checkpointing_enab"):
        gradients(moe, two_batches())


def test_the_mask_reaches_opt_through_every_head():
    """Its causal LM and its question answering call the decoder, past the backbone."""
    batch = padded_batch()
    for stock in stock_classes(FAMILIES["opt"]):
        moe = ummrm.upcycle(stock(tiny_config("opt", num_labels=2)).eval(), CONFIG)
        moe(**batch)
        assert all(int(c.sum()) == 2 * int(batch["attention_mask"].sum()) for c in slots(moe).values())
    assert reward_class("opt") in stock_classes(FAMILIES["opt"])


def test_a_backbone_that_drops_the_mask_is_an_error():
    """As some do in transformers 5.0: the mask is an argument that they do not pass on."""
    moe, batch = trainable_moe("llama"), padded_batch()

    def drop(layer, args, kwargs):
        return args, {key: value for key, value in kwargs.items() if key != "token_mask"}

    for layer in moe.base_model.layers:
        layer.register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(RuntimeError, match="UmmLlamaModel .* passes it on to none; upgrade transformers, or set"):
        moe(**batch)
    moe(input_ids=batch["input_ids"])  # without padding there is none to lose
