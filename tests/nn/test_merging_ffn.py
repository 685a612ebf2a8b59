"""MergingFFN and merging of somebody's own network, with no Hugging Face class around it."""

import copy
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
