"""MergingFFN and merging of somebody's own network, with no Hugging Face class around it."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from own_networks import HIDDEN, SMALL, TwoLayer, perturbed, upcycled_network
from test_dense import Gated
from torch import nn

import ummrm
from ummrm import MergeConfig, UpcycledFFN


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


def test_to_dense_without_a_template_is_a_clear_error():
    network = ummrm.prepare_merge(upcycled_network())
    network.ffns[0]._dense_template = None
    with pytest.raises(ValueError, match=r"MergingFFN.to_dense needs the module .*ummrm.merge\(model\)"):
        network.ffns[0].to_dense()


def merging_network(shared_share, seed=0, **options):
    torch.manual_seed(seed)
    network = upcycled_network()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return ummrm.prepare_merge(network, MergeConfig(shared_share=shared_share, **options))


def test_a_fixed_lambda_is_in_the_state_dict_and_loading_takes_it_over():
    saved, other, x = merging_network(0.9), merging_network(0.5, seed=1), torch.randn(5, 3)
    assert not torch.equal(other(x), saved(x))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    for name, coefficients in ummrm.merge_coefficients(other).items():
        assert torch.equal(coefficients, ummrm.merge_coefficients(saved)[name])
    assert torch.equal(ummrm.merge(other)(x), ummrm.merge(saved)(x))
    share = other.ffns[0].umm_merge_share
    assert share.merge_config == MergeConfig(shared_share=0.9) and repr(share) == "MergeShare(0.9, learned=False)"
    with torch.no_grad():
        share.share.fill_(1 / 3)
    assert share.merge_config == MergeConfig(shared_share=0.33333334)
    share.share.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"`ffns.0.umm_merge_share.share`.* must be a number in \[0, 1\], got nan"):
        other.load_state_dict(saved.state_dict() | {"ffns.0.umm_merge_share.share": share.share})


def test_a_fixed_lambda_is_not_mistaken_for_a_learned_one():
    fixed, learned = merging_network(0.9), merging_network(0.9, learn_shared_share=True)
    for target, source in ((fixed, learned), (learned, fixed)):
        with pytest.raises(RuntimeError, match="Missing key.*umm_merge_share"):
            target.load_state_dict(source.state_dict())


def assigned(network, dtype):
    """Loads by assigning a lambda of `dtype`, and then sets it to 0.9, which `dtype` may not hold."""
    state = {k: v.to(dtype) if "umm_merge_share" in k else v for k, v in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    network.ffns[1]._share[0].share.fill_(0.9)
    return network


CARRIERS = {
    "half": lambda n: n.half(),
    "bfloat16": lambda n: n.bfloat16(),
    "bfloat16 and back": lambda n: n.bfloat16().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda n: pickle.loads(pickle.dumps(n)),
    "to_empty": lambda n: n.to_empty(device="cpu"),
    "bfloat16 assigned": lambda n: assigned(n, torch.bfloat16),
    "meta and to_empty": lambda n: n.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("how", CARRIERS)
def test_a_fixed_lambda_stays_what_it_is_in_fp32(how):
    """0.9 in bf16 would be 0.8984. A network that lost its weights still has the lambda that it was prepared with."""
    network = CARRIERS[how](merging_network(0.9))
    share = network.ffns[1]._share[0]
    assert share is network.ffns[0]._share[0] is network.ffns[0].umm_merge_share
    (name,) = (n for n in network.state_dict() if "umm_merge_share" in n)
    assert network.state_dict()[name].dtype == torch.float32
    for coefficients in ummrm.merge_coefficients(network).values():
        torch.testing.assert_close(coefficients[:, :2], torch.full((3, 2), 0.45), rtol=1e-7, atol=0)


def test_a_compiled_merge_phase_follows_its_lambda():
    network, x = merging_network(0.9), torch.randn(5, 3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x))
    before = network(x)
    network.load_state_dict(merging_network(0.25).state_dict())
    torch.testing.assert_close(compiled(x), network(x))
    assert not torch.allclose(network(x), before, atol=1e-3)
