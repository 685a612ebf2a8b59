"""UpcycledFFN as a plain module, with no Hugging Face class around it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from own_networks import HIDDEN, SMALL, perturbed, upcycled_network
from test_dense import Gated
from torch import nn

from ummrm import FFNPaths, UpcycleConfig, UpcycledFFN
from ummrm.nn import experts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", ["shared_complement", "fixed"])
@pytest.mark.parametrize("shape", [(HIDDEN,), (5, HIDDEN), (2, 3, HIDDEN), (0, HIDDEN)])
def test_from_dense_computes_what_the_dense_ffn_did(bias, gate, shape):
    ffn, x = Gated(F.silu, bias=bias), torch.randn(*shape)
    before = copy.deepcopy(ffn.state_dict())
    moe = UpcycledFFN.from_dense(ffn, UpcycleConfig(num_experts=5, num_experts_per_tok=3, gate=gate))
    torch.testing.assert_close(moe(x), ffn(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in ffn.state_dict().items())


def test_from_dense_takes_named_paths_dtype_device_and_mode():
    ffn = Gated(F.relu).to(torch.float64).eval()
    moe = UpcycledFFN.from_dense(ffn, SMALL, FFNPaths(gate="b", up="a", down="c", activation="relu"))
    assert not moe.training
    assert moe.experts.down_proj.dtype == torch.float64 and moe.router.weight.dtype == torch.float32
    x = torch.randn(6, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(moe(x), ffn(x), rtol=1e-6, atol=1e-6)


def test_noise_that_is_drawn_in_parts_is_that_of_the_whole(monkeypatch):
    for shape in ((3, 5), (2, 7, 9), (4, 16, 16)):
        drawn = []
        for part in (1 << 20, 32):
            monkeypatch.setattr(experts, "_NOISE_PART", part)
            torch.manual_seed(7)
            drawn.append(torch.ones(shape, dtype=torch.bfloat16))
            experts.add_noise(drawn[-1], 0.5)
        torch.manual_seed(7)
        whole = torch.ones(shape, dtype=torch.bfloat16) + (torch.randn(shape) * 0.5).bfloat16()
        assert torch.equal(drawn[0], whole) and torch.equal(drawn[1], whole)


def test_expert_noise_makes_routed_experts_distinct_and_keeps_the_shared_one():
    ffn = Gated(F.silu, bias=True)
    moe = UpcycledFFN.from_dense(ffn, UpcycleConfig(num_experts=3, num_experts_per_tok=1, expert_noise=0.1))
    up = torch.cat([ffn.b.weight, ffn.a.weight])
    assert torch.equal(moe.shared_experts.gate_up_proj[0], up)
    for expert in moe.experts.gate_up_proj:
        ratio = (expert - up).std() / up.std()
        assert 0.07 < ratio < 0.13
    assert not torch.equal(moe.experts.gate_up_proj[0], moe.experts.gate_up_proj[1])
    assert torch.equal(moe.experts.down_proj_bias, ffn.c.bias.expand(3, -1))


def test_masked_tokens_are_the_shared_experts_alone_and_leave_the_others_alone():
    moe, x = perturbed(Gated(F.silu, bias=True)), torch.randn(7, HIDDEN)
    mask = torch.tensor([True, True, False, True, False, True, True])
    out = moe(x, token_mask=mask)
    statistics = moe.statistics
    torch.testing.assert_close(out[mask], moe(x[mask]), rtol=1e-5, atol=1e-6)
    assert (statistics.shared_weight[~mask] == 1).all()
    statistics.shared_weight = statistics.shared_weight[mask]
    for got, alone in zip(vars(statistics).values(), vars(moe.statistics).values(), strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-6) if torch.is_tensor(got) else None
    shared = moe.shared_experts
    z = torch.einsum("th,snh->stn", x, shared.gate_up_proj) + shared.gate_up_proj_bias[:, None]
    gate, up = z.chunk(2, -1)
    dense = torch.einsum("sti,shi->sth", F.silu(gate) * up, shared.down_proj) + shared.down_proj_bias[:, None]
    torch.testing.assert_close(out[~mask], dense.mean(0)[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.randn(3, HIDDEN + 1)), ValueError, r"`x` must be \[..., 10\].*got \[3, 11\]"),
        (
            lambda m: m(torch.randn(3, HIDDEN), torch.ones(4, dtype=torch.bool)),
            ValueError,
            r"`token_mask` .*\[3\], got \[4\]",
        ),
        (lambda m: UpcycledFFN.from_dense(m, SMALL), ValueError, "upcycled already"),
        (lambda m: UpcycledFFN.from_dense("ffn", SMALL), TypeError, "`ffn` must be a Module, got str"),
        (lambda m: UpcycledFFN.from_dense(Gated(F.silu), {}), TypeError, "`config` must be a UpcycleConfig, got dict"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(perturbed(Gated(F.silu)))


def test_state_dict_round_trip():
    network, other, x = upcycled_network(), upcycled_network(), torch.randn(5, 3)
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(x), network(x))


@pytest.mark.parametrize(
    "ffn",
    [Gated(F.gelu), nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, HIDDEN))],
)
def test_named_paths_are_proven_too(ffn):
    gated = isinstance(ffn, Gated)
    wrong = FFNPaths(gate="b", up="a", down="c", activation="silu") if gated else FFNPaths(up="1", down="3")
    with pytest.raises(ValueError, match="`paths` must name an FFN that computes what `ffn` computes; .* is off by"):
        UpcycledFFN.from_dense(ffn, SMALL, wrong)


def test_named_paths_find_the_activation():
    ffn, x = Gated(F.gelu), torch.randn(4, HIDDEN)
    moe = UpcycledFFN.from_dense(ffn, SMALL, FFNPaths(gate="b", up="a", down="c"))
    assert moe.spec.activation == "gelu"
    torch.testing.assert_close(moe(x), ffn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.float32])
def test_recognition_does_not_depend_on_torchs_default_dtype(default):
    ffn = Gated(F.silu)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert UpcycledFFN.from_dense(ffn, SMALL).spec.activation == "silu"
    finally:
        torch.set_default_dtype(before)
