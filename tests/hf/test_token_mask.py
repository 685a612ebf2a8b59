"""The token mask in every family: padding is routed nowhere, recomputation has the same mask; and dropout stays."""

import copy
import threading

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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.attention.flex_attention import create_block_mask

import ummrm
from ummrm import UpcycleConfig
from ummrm.hf.families import FAMILIES
from ummrm.hf.masks import token_mask_of
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


CHECKPOINTED = [in_tier(m) for m in MODEL_TYPES if reward_class(m).supports_gradient_checkpointing]


@pytest.mark.parametrize("model_type", CHECKPOINTED)
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


# lfm2 has no dropout, and transformers checks that mpt's is a whole number
DROPPING = [in_tier(m) for m in MODEL_TYPES if m not in ("lfm2", "mpt")]


@pytest.mark.parametrize("model_type", DROPPING)
def test_dropout_stays_where_it_was(model_type):
    """At upcycling the mixture equals the dense model in training mode too: the same seed drops the same values."""
    names = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "residual_dropout", "dropout", "attention_dropout")
    config = tiny_config(model_type)
    refused = {field for field, *_ in FAMILIES[model_type].refused}
    dropouts = {name: 0.3 for name in names if hasattr(config, name) and name not in refused}
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


# ---- masks of other kinds ---------------------------------------------------------------------------------------


def four_d(batch, causal, dtype=torch.bool, heads=1):
    """[batch, heads, queries, keys] of a padded batch, as transformers makes it."""
    live = batch["attention_mask"].bool()
    allowed = live[:, None, None, :].expand(-1, heads, live.shape[1], -1)
    allowed = allowed.tril() if causal else allowed.clone()
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


KINDS = [(model_type, kind) for model_type in ("llama", "gpt2", "opt", "falcon", "bert") for kind in ("bool", "float")]
KINDS += [("llama", "heads"), ("llama", "half"), ("gemma3_text", "bool"), ("gemma3_text", "dict")]


@pytest.mark.parametrize(("model_type", "kind"), KINDS)
def test_a_4d_mask_routes_what_the_2d_mask_routes(model_type, kind):
    """Same statistics, same hidden states: ten keys, of which two are padding."""
    causal = model_type != "bert"
    backbone, batch = trainable_moe(model_type).eval().base_model, padded_batch(lengths=(5, 3))
    live = batch["attention_mask"].bool()
    expected = backbone(**batch).last_hidden_state[live]
    counted = slots(backbone)
    assert all(int(c.sum()) == 8 * CONFIG.num_experts_per_tok for c in counted.values())
    mask = {
        "bool": lambda: four_d(batch, causal),
        "float": lambda: four_d(batch, causal, torch.float32),
        "heads": lambda: four_d(batch, causal, heads=4),
        # the minimum of another dtype than the mask's hides as well
        "half": lambda: four_d(batch, causal, torch.float16).float(),
        "dict": lambda: {k: four_d(batch, causal) for k in ("full_attention", "sliding_attention")},
    }[kind]()
    positions = {"position_ids": torch.arange(5).expand(2, 5)} if model_type == "opt" else {}  # it counts a 2-D mask
    got = backbone(input_ids=batch["input_ids"], attention_mask=mask, **positions).last_hidden_state[live]
    assert all(torch.equal(c, counted[name]) for name, c in slots(backbone).items())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_batch_has_no_padding():
    """Block-diagonal and causal: every token is attended to by itself."""
    backbone = trainable_moe("llama").eval().base_model
    ids = torch.randint(3, 60, (1, 10))
    sequence = torch.tensor([0] * 6 + [1] * 4)
    mask = ((sequence[:, None] == sequence[None]) & torch.ones(10, 10).tril().bool())[None, None]
    positions = torch.tensor([[*range(6), *range(4)]])
    got = backbone(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    assert all(int(c.sum()) == 10 * CONFIG.num_experts_per_tok for c in slots(backbone).values())
    apart = [backbone(input_ids=ids[:, part]).last_hidden_state for part in (slice(6), slice(6, 10))]
    torch.testing.assert_close(got, torch.cat(apart, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_generation_with_a_static_cache_equals_one_without(model_type):
    """Its masks are 4-D (a dict of them where layers differ), over keys that are yet to come."""
    stock = next(c for c in stock_classes(FAMILIES[model_type]) if c.__name__.endswith("ForCausalLM"))
    moe = perturb_experts(ummrm.upcycle(stock(tiny_config(model_type)).eval(), CONFIG))
    batch = padded_batch(side="left")
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    counts = {}
    for cache in ("static", "dynamic"):
        with ummrm.record_routing_statistics(moe) as statistics:
            ids = moe.generate(**batch, cache_implementation=cache, disable_compile=True, **kwargs)
        counts[cache] = ids.tolist(), statistics.tokens
    assert counts["static"] == counts["dynamic"]
    live = int(batch["attention_mask"].sum()) + 3 * len(batch["input_ids"])  # the last token goes through no layer
    assert set(counts["static"][1].values()) == {live}


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


@pytest.mark.parametrize("length", [2, torch.tensor(2)], ids=["int", "tensor"])
@pytest.mark.parametrize(
    ("keys", "live"),
    [
        ([1, 0, 1, 0, 1], [[True, False, True]]),  # two past tokens, then the call's three
        ([1, 0, 1, 0, 1, 0, 0], [[True, False, True]]),  # and two that are yet to come
        ([0, 1, 0, 1], [[True, False, True]]),  # one of the past ones has been dropped
    ],
)
def test_the_calls_own_tokens_are_found_among_the_keys_of_a_cache(keys, live, length):
    mask = torch.tensor(keys).bool()[None, None, None].expand(1, 2, 3, -1)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert token_mask_of(mask, tokens, Cache(length)).tolist() == live


def test_what_kinds_of_layers_see_is_live_together():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    far, near = (torch.tensor(keys).bool()[None, None, None] for keys in ([1, 1, 0], [0, 1, 0]))
    assert token_mask_of({"full": far, "sliding": near}, tokens).tolist() == [[True, True, False]]
    assert token_mask_of({"full": None, "sliding": near}, tokens) is None, "no mask hides nothing"
    assert token_mask_of({}, tokens) is None
    assert token_mask_of(far[0], tokens.expand(2, 3)).tolist() == [[True, True, False]] * 2
    assert token_mask_of(far.float().log(), tokens).tolist() == [[True, True, False]], "minus infinity hides"


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(2, 1, 5, 5, dtype=torch.long), r"int64 \[2, 1, 5, 5\]"),
        (torch.ones(2, 1, 5, 5), r"float32 \[2, 1, 5, 5\] with values above 0"),
        (torch.zeros(2, 5, 5), r"float32 \[2, 5, 5\]"),
        (torch.ones(2, 1, 5, 4, dtype=torch.bool), r"bool \[2, 1, 5, 4\] for 2 sequences of 5 tokens"),
        (torch.ones(2, 1, 5, 9, dtype=torch.bool), r"bool \[2, 1, 5, 9\] for 2 sequences of 5 tokens"),
        (torch.ones(3, 1, 5, 5, dtype=torch.bool), r"bool \[3, 1, 5, 5\] for 2 sequences of 5 tokens"),
        (torch.ones(10, dtype=torch.bool), r"bool \[10\]"),
        (create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 128, 128, device="cpu"), "BlockMask"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "falcon"])
def test_a_mask_that_is_not_understood_is_an_error_and_a_token_mask_the_remedy(model_type, mask, got):
    moe = trainable_moe(model_type)
    ids = torch.randint(3, 60, (2, 5))
    with pytest.raises(ValueError, match=f"`attention_mask` must say which tokens are .*got {got}; .*token_mask="):
        moe.base_model(input_ids=ids, attention_mask=mask)
    live = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    moe.base_model(input_ids=ids, token_mask=live)
    assert all(int(c.sum()) == 8 * CONFIG.num_experts_per_tok for c in slots(moe).values())


def test_a_merged_ffn_needs_no_token_mask():
    moe = ummrm.prepare_merge(trainable_moe("llama").eval())
    batch = padded_batch(lengths=(6, 4))
    mask = four_d(batch, causal=True, dtype=torch.float32) + 0.5  # a bias that is no mask of padding
    assert torch.isfinite(moe.base_model(batch["input_ids"], mask).last_hidden_state).all()


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
def test_a_second_thread_is_refused_rather_than_given_anothers_mask(model_type):
    """A layer holds the mask of one call; a merged model is a stock one, and any number of threads may run it."""
    moe = ummrm.upcycle(tiny_model(model_type), UpcycleConfig()).eval()
    batch, inside, leave = padded_batch(), threading.Event(), threading.Event()
    expected = outputs_of(moe, batch)

    def stay(*_):
        if not inside.is_set():
            inside.set()
            assert leave.wait(60)

    handle = next(iter(upcycled_ffns(moe).values())).register_forward_pre_hook(stay)
    found = []
    first = threading.Thread(target=lambda: found.append(outputs_of(moe, batch)))
    first.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="must run in one thread at a time"):
        outputs_of(moe, {"input_ids": batch["input_ids"]})
    own = copy.deepcopy(moe)  # the remedy, taken while the other thread is inside
    leave.set()
    first.join()
    handle.remove()
    assert torch.equal(found[0], expected) and torch.equal(outputs_of(moe, batch), expected)
    assert torch.equal(outputs_of(own, batch), expected)
