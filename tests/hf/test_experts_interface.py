"""`experts_implementation="ummrm"`: stock mixture-of-experts models on these kernels, equal to transformers' eager."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward, use_experts_implementation
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ummrm import ops
from ummrm.hf import experts_interface

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# model_type to what its configuration needs beside SIZES; gated and fused by default
STOCK = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 20, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},  # transposed, interleaved, biased, its own gate
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 0,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
    },
}
FUSED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3"}


def stock_pair(model_type, dtype=torch.float32):
    """One random model in eager and a copy on the kernels."""
    config = CONFIG_MAPPING[model_type](**{**SIZES, **STOCK[model_type]})
    eager = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases start at zero: make a lost one visible
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("ummrm")
    return eager, ours


def run(model, ids, mask):
    out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    return out.logits[mask.bool()], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """Names of the package's operators that were called."""
    seen = set()
    for name in ("moe_ffn", "expert_gemm", "unpermute"):
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _name=name, _original=original, **k: seen.add(_name) or _original(*a, **k)
        )
    return seen


@pytest.mark.parametrize("model_type", sorted(STOCK))
def test_a_stock_model_equals_eager_forward_and_backward(model_type, calls):
    eager, ours = stock_pair(model_type)
    ids, mask = torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    expected, gradients = run(eager, ids, mask)
    assert not calls
    got, ours_gradients = run(ours, ids, mask)
    assert calls == ({"moe_ffn"} if model_type in FUSED else {"expert_gemm", "unpermute"})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == ours_gradients.keys() and any("experts" in n for n in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours_gradients[name], gradient, rtol=1e-3, atol=1e-5 * (1 + gradient.abs().max()))


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_low_precision_is_at_most_twice_as_far_from_the_truth_as_eager(model_type, autocast):
    eager, _ = stock_pair(model_type)
    module = next(m for m in eager.modules() if type(m).__name__.endswith("Experts"))
    x, index, weights = torch.randn(40, 24), torch.randint(0, 4, (40, 1)), torch.rand(40, 1)
    truth = module(x, index, weights)
    if not autocast:
        module, x, weights = module.bfloat16(), x.bfloat16(), weights.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = module(x, index, weights)
        mine = experts_interface.experts_forward(module, x, index, weights)
    assert mine.dtype == theirs.dtype == x.dtype
    assert 0 < (mine.float() - truth).norm() <= 2 * (theirs.float() - truth).norm()


def make_experts(activation=None, gate=None, norm=None, sizes=(4, 12, 10), **flags):
    """An experts module of a layout that a decorated class may have."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            experts, hidden, inner = sizes
            rows = inner * (2 if flags.get("has_gate", True) else 1)
            up = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
            transpose = flags.get("is_transposed", False)

            def parameter(out, width):
                shape = (experts, width, out) if transpose else (experts, out, width)
                return nn.Parameter(0.3 * torch.randn(shape))

            self.num_experts = experts
            setattr(self, up, parameter(rows, hidden))
            self.down_proj = parameter(hidden, inner)
            if flags.get("has_bias"):
                setattr(self, f"{up}_bias", nn.Parameter(torch.randn(experts, rows)))
                self.down_proj_bias = nn.Parameter(torch.randn(experts, hidden))
            self.act_fn = activation or nn.SiLU()
            if norm is not None:
                self.post_expert_norm = norm

        def forward(self, *args):
            raise AssertionError("the interface calls a registered function")

    if gate is not None:
        Experts._apply_gate = gate
    return use_experts_implementation(**flags)(Experts)(None)


LAYOUTS = {
    "biased": {"has_bias": True},
    "plain": {"has_gate": False, "activation": nn.ReLU()},
    "plain biased gelu": {"has_gate": False, "has_bias": True, "activation": nn.GELU()},
    "transposed": {"is_transposed": True},
    "transposed biased": {"is_transposed": True, "has_bias": True},
    "foreign activation": {"activation": nn.Mish()},
    "foreign gate": {"gate": lambda self, z: z[..., ::2].sigmoid() * z[..., 1::2], "is_concatenated": False},
    "foreign activation, plain, biased": {"activation": nn.Softplus(), "has_gate": False, "has_bias": True},
    "norm": {"norm": nn.LayerNorm(12), "has_post_expert_norm": True},
}


@pytest.mark.parametrize("parallel", [False, True], ids=["", "expert parallel"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_equals_transformers_own_batched_path(layout, parallel):
    module = make_experts(**LAYOUTS[layout])
    index = torch.stack([torch.randperm(4)[:2] for _ in range(11)])
    weights = torch.rand(11, 2)
    if parallel:  # another process holds these experts: index out of range, weight zero
        module._is_expert_parallel = True
        index[2, 1], index[5] = 4, 4
        weights[2, 1], weights[5] = 0, 0
    results = []
    for function in (batched_mm_experts_forward, experts_interface.experts_forward):
        x = torch.linspace(-2, 2, 11 * 12).reshape(11, 12).sin().requires_grad_()
        w = weights.clone().requires_grad_()
        out = function(module, x, index, w)
        parameters = list(module.parameters())
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, w, *parameters])))
    for mine, theirs in zip(*results, strict=True):
        if parallel and mine.shape == weights.shape:  # what no expert here computes has no gate gradient to compare
            mine, theirs = mine[index.lt(4)], theirs[index.lt(4)]
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


def test_it_can_be_asked_for_when_loading(tmp_path):
    eager, _ = stock_pair("mixtral")
    eager.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, experts_implementation="ummrm")
    assert loaded.config._experts_implementation == "ummrm" and "ummrm" in ALL_EXPERTS_FUNCTIONS
    ids = torch.randint(3, 61, (2, 7))
    torch.testing.assert_close(loaded(ids).last_hidden_state, eager.model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_one_graph(compiled):
    module = make_experts()
    module.config = type("Config", (), {"_experts_implementation": "ummrm"})()
    x, index, weights = torch.randn(7, 12), torch.randint(0, 4, (7, 1)), torch.rand(7, 1)
    torch.testing.assert_close(compiled(module)(x, index, weights), module(x, index, weights))


@pytest.mark.parametrize("spoil", ["float8", "missing", "flat"])
def test_what_it_cannot_serve_is_refused_with_the_remedy(spoil):
    module = make_experts()
    if spoil == "float8":
        module.down_proj = nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    elif spoil == "missing":
        del module.down_proj
    else:
        module.down_proj = nn.Parameter(module.down_proj.detach().flatten(1))
    with pytest.raises(ValueError, match=r'Experts.down_proj must be .* with experts_implementation="grouped_mm"'):
        experts_interface.experts_forward(module, torch.randn(2, 12), torch.zeros(2, 1).long(), torch.ones(2, 1))
