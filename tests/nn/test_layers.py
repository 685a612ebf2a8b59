"""UpcycledFFN, MergingFFN and Router as plain modules, with no Hugging Face class around them."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_dense import Gated
from torch import nn

import ummrm
from ummrm import FFNPaths, MergeConfig, UpcycleConfig, UpcycledFFN
from ummrm.nn.router import Router

HIDDEN = 10
SMALL = UpcycleConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=2)


def perturbed(ffn, config=SMALL):
    moe = UpcycledFFN.from_dense(ffn, config)
    with torch.no_grad():
        for p in moe.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return moe


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


class TwoLayer(nn.Module):
    """Somebody's own network."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, HIDDEN)
        self.ffns = nn.ModuleList(Gated(F.gelu, bias=True) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x):
        x = self.embed(x)
        for ffn in self.ffns:
            x = x + ffn(x)
        return self.head(x)


def upcycled_network(config=SMALL):
    network = TwoLayer()
    for i, ffn in enumerate(network.ffns):
        network.ffns[i] = UpcycledFFN.from_dense(ffn, config)
    return network


def test_a_plain_torch_loop_upcycles_trains_merges_and_gives_the_own_module_class_back():
    torch.manual_seed(0)
    network = TwoLayer()
    x = torch.randn(64, 3)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    expected = network(x)
    for i, ffn in enumerate(network.ffns):
        network.ffns[i] = UpcycledFFN.from_dense(ffn, SMALL)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)

    def train(parameters, steps, extra):
        optimizer = torch.optim.Adam(parameters, 1e-2)
        losses = []
        for _ in range(steps):
            loss = F.mse_loss(network(x), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            (loss + extra()).backward()
            optimizer.step()
        return losses

    losses = train(network.parameters(), 60, lambda: ummrm.auxiliary_loss(network))
    assert losses[-1] < 0.5 * losses[0]

    ummrm.prepare_merge(network)
    frozen = {n: p.detach().clone() for n, p in network.named_parameters() if "alpha" not in n}
    alphas = [p for p in network.parameters() if p.requires_grad]
    assert len(alphas) == 2
    losses = train(alphas, 40, lambda: ummrm.auxiliary_loss(network))
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(network.named_parameters())[n], p) for n, p in frozen.items())

    merged = ummrm.merge(network)
    assert type(merged.ffns[0]) is Gated and merged.state_dict().keys() == TwoLayer().state_dict().keys()
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in TwoLayer().parameters())
    torch.testing.assert_close(merged(x), network(x), rtol=1e-5, atol=1e-6)
    assert ummrm.merge_coefficients(network).keys() == {"ffns.0", "ffns.1"}


@pytest.mark.parametrize("make", [upcycled_network, lambda: ummrm.prepare_merge(upcycled_network())])
def test_networks_copy_and_pickle_after_a_forward(make):
    network, x = make(), torch.randn(5, 3)
    out = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other(x), out)
        with torch.no_grad():
            next(p for p in other.parameters() if p.requires_grad).add_(1.0)
        torch.testing.assert_close(network(x), out)


def test_state_dict_round_trip():
    network, other, x = upcycled_network(), upcycled_network(), torch.randn(5, 3)
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(x), network(x))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_router_logits_are_fp32_whatever_the_input(kind):
    router = Router(HIDDEN, UpcycleConfig(num_experts=4, num_experts_per_tok=2, router=kind, router_init_std=0.5))
    x = torch.randn(6, HIDDEN, dtype=torch.bfloat16)
    expected = x.double() @ router.weight.double().T
    if kind == "mlp":
        expected = expected.tanh() @ router.output_weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(router.logits(x).double(), expected, rtol=1e-1, atol=1e-1)
        out = router(x)
    assert out.routed_weights.dtype == torch.float32
    torch.testing.assert_close(out.mean_prob.double(), expected.softmax(-1).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", ["jitter", "learned"])
def test_router_noise_is_for_training_and_leaves_the_statistics_clean(noise):
    config = UpcycleConfig(
        num_experts=6, num_experts_per_tok=2, router_noise=noise, jitter_eps=0.9, router_init_std=0.3
    )
    router, x = Router(HIDDEN, config), torch.randn(200, HIDDEN)
    clean = router.eval()(x)
    assert torch.equal(router(x).routed_weights, clean.routed_weights)
    noisy = router.train()(x)
    assert not torch.equal(noisy.routed_weights, clean.routed_weights)
    torch.testing.assert_close(noisy.mean_prob, clean.mean_prob)
    torch.testing.assert_close(noisy.mean_z, clean.mean_z)


def test_learned_noise_starts_at_the_papers_standard_deviation():
    config = UpcycleConfig(num_experts=6, num_experts_per_tok=2, router_noise="learned", router_init_std=0.0)
    router = Router(HIDDEN, config)
    captured = []
    original = ummrm.nn.router.ops.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ummrm.nn.router.ops, "route", lambda logits, *a, **k: captured.append(logits) or original(logits, *a, **k)
        )
        router(torch.randn(4000, HIDDEN))
    assert captured[0].std().item() == pytest.approx(math.log(2) + 0.01, rel=0.03)


def test_router_gradients_reach_every_router_parameter():
    config = UpcycleConfig(num_experts=4, num_experts_per_tok=2, router="mlp", router_noise="learned")
    moe = perturbed(Gated(F.silu), config)
    moe(torch.randn(20, HIDDEN)).square().sum().backward()
    for name, parameter in moe.router.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("per", ["layer", "projection"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_merge_coefficients_follow_the_definition(per, share):
    network = ummrm.prepare_merge(upcycled_network(), MergeConfig(shared_share=share, alpha_per=per))
    for ffn in network.ffns:
        with torch.no_grad():
            ffn.alpha.normal_()
        coefficients = ffn.coefficients()
        assert coefficients.shape == (3, 2 + 4)
        torch.testing.assert_close(coefficients[:, :2], torch.full((3, 2), share / 2))
        torch.testing.assert_close(coefficients[:, 2:], ((1 - share) * ffn.alpha.softmax(-1)).expand(3, -1))


def test_lambda_one_gives_the_mean_of_the_shared_experts():
    network = upcycled_network()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    ummrm.prepare_merge(network, MergeConfig(shared_share=1.0))
    merged = ummrm.merge(network)
    for ffn, dense in zip(network.ffns, merged.ffns, strict=True):
        torch.testing.assert_close(dense.c.weight, ffn.shared_experts.down_proj.mean(0))


def test_a_learned_lambda_is_one_parameter_of_any_network():
    """Also of one that runs its children one by one, where a registered extra child would be run too."""
    network = nn.Sequential(*(UpcycledFFN.from_dense(Gated(F.silu), SMALL) for _ in range(3)))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ummrm.prepare_merge(network, MergeConfig(shared_share=0.25, learn_shared_share=True))
    x = torch.randn(5, HIDDEN)
    network(x).square().sum().backward()
    learned = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert set(learned) == {"0.alpha", "1.alpha", "2.alpha", "0.umm_merge_share.logit"}
    assert all(p.grad.abs().max() > 0 for p in learned.values())
    with torch.no_grad():
        learned["0.umm_merge_share.logit"].fill_(20.0)
    for coefficients in ummrm.merge_coefficients(network).values():
        torch.testing.assert_close(coefficients[:, :2], torch.full((3, 2), 0.5))
    torch.testing.assert_close(ummrm.merge(network)(x), network(x), rtol=1e-5, atol=1e-6)
    assert set(copy.deepcopy(network).state_dict()) == set(network.state_dict())


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


def test_an_ffn_used_in_two_places_is_exchanged_in_both():
    ffn = UpcycledFFN.from_dense(Gated(F.silu), SMALL)
    network = ummrm.prepare_merge(nn.Sequential(ffn, nn.Tanh(), ffn))
    assert network[0] is network[2] and type(network[0]).__name__ == "MergingFFN"
    merged, x = ummrm.merge(network), torch.randn(3, HIDDEN)
    assert type(merged[0]) is Gated and merged[0] is merged[2]
    torch.testing.assert_close(merged(x), network(x), rtol=1e-5, atol=1e-6)


def test_a_bare_upcycled_ffn_cannot_be_exchanged_in_place_and_is_left_alone():
    ffn = UpcycledFFN.from_dense(Gated(F.silu), SMALL)
    with pytest.raises(ValueError, match=r"got one alone.*wrap it: torch.nn.Sequential\(ffn\)"):
        ummrm.prepare_merge(ffn)
    assert all(p.requires_grad for p in ffn.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_merge_phase_survives_a_cast_of_the_network(dtype):
    network = ummrm.prepare_merge(nn.Sequential(perturbed(Gated(F.silu))), MergeConfig(learn_shared_share=True))
    x = torch.randn(4, HIDDEN)
    expected = network(x)
    network.to(dtype)
    tolerance = 1e-5 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(network(x.to(dtype)).float(), expected, rtol=tolerance, atol=tolerance)
    assert ummrm.merge(network)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("default", [torch.float64, torch.float32])
def test_recognition_does_not_depend_on_torchs_default_dtype(default):
    ffn = Gated(F.silu)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert UpcycledFFN.from_dense(ffn, SMALL).spec.activation == "silu"
    finally:
        torch.set_default_dtype(before)


def test_to_dense_without_a_template_is_a_clear_error():
    network = ummrm.prepare_merge(upcycled_network())
    network.ffns[0]._dense_template = None
    with pytest.raises(ValueError, match=r"MergingFFN.to_dense needs the module .*ummrm.merge\(model\)"):
        network.ffns[0].to_dense()
