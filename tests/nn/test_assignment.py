"""Assignment by sequence in any PyTorch network: groups, their order, members, gradients against a loop over them."""

import copy
import pickle

import pytest
import torch
from own_networks import HIDDEN, TwoLayer
from torch import nn

import ummrm
from ummrm import UpcycleConfig, UpcycledFFN
from ummrm.nn import UpcycledLinear
from ummrm.nn.assignment import RowGroups

E = 4
FFN = UpcycleConfig(assignment="sequence", expert_noise=0.3)
SETTINGS = {
    "ffn": FFN,
    "shared expert": UpcycleConfig(
        assignment="sequence", num_shared_experts=2, fixed_shared_weight=0.3, expert_noise=0.3
    ),
    "linear": UpcycleConfig(assignment="sequence", experts_in="linear", expert_noise=0.3),
    "all": UpcycleConfig(assignment="sequence", experts_in="all", expert_noise=0.3),
}


class Tokens(TwoLayer):
    """[rows, tokens, 3] to one score a row."""

    def forward(self, x):
        return super().forward(x).mean(1)


def network(setting="ffn"):
    config, net = SETTINGS[setting], Tokens()
    for i, ffn in enumerate(net.ffns):
        net.ffns[i] = UpcycledFFN.from_dense(ffn, config)
    if config.experts_in != "ffn":
        net.embed = UpcycledLinear.from_dense(net.embed, config)
    if config.experts_in == "all":
        net.head = UpcycledLinear.from_dense(net.head, config)
    return net


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3, 4, 5, 16, 17, 63])
def test_groups_are_dealt_evenly_and_depend_on_seed_and_step_alone(pairs):
    state = torch.get_rng_state()
    drawn = {(seed, step): ummrm.draw_groups(pairs, E, seed=seed, step=step) for seed in range(6) for step in range(40)}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    for (seed, step), groups in drawn.items():
        assert groups.dtype == torch.int64 and groups.shape == (pairs,)
        sizes = groups.bincount(minlength=E)
        assert sizes.max() - sizes.min() <= 1 and len(sizes) == E
        assert torch.equal(ummrm.draw_groups(pairs, E, seed=seed, step=step), groups)
    # every pair meets every expert alike, whichever sit out
    shares = torch.stack([torch.nn.functional.one_hot(g, E) for g in drawn.values()]).double().mean(0)
    assert (shares - 1 / E).abs().max() < 6 * (0.25 * 0.75 / len(drawn)) ** 0.5
    if pairs >= 4:
        assert len({tuple(g.tolist()) for g in drawn.values()}) > 20


@pytest.mark.parametrize(("pairs", "experts"), [(0, 4), (4, 0), (-1, 2)])
def test_nothing_to_draw_is_an_error(pairs, experts):
    with pytest.raises(ValueError, match="must be at least 1"):
        ummrm.draw_groups(pairs, experts, seed=0, step=0)


def test_rows_of_each_expert():
    groups = RowGroups(torch.tensor([2, 0, 2, 3]), E)
    assert groups.order.tolist() == [1, 0, 2, 3] and groups.inverse.tolist() == [1, 0, 2, 3]
    assert groups.row_offsets.tolist() == [0, 1, 1, 3, 4]
    assert groups.offsets(torch.empty(12, 1)).tolist() == [0, 3, 3, 9, 12]
    assert RowGroups(torch.tensor([0, 0, 3]), E).order is None
    every = RowGroups.of_all(3, E)
    assert (every.rows, every.copies, every.row_offsets.tolist()) == (12, 4, [0, 3, 6, 9, 12])
    with pytest.raises(ValueError, match="got 4 for 13 tokens"):
        groups.offsets(torch.empty(13, 1))


# ---- what a network computes ----------------------------------------------------------------------------------------


def of_member(net, x, rows, member):
    """The rows of one member by themselves."""
    ummrm.assign_groups(net, torch.full((len(rows),), member))
    return net(x[rows])


@pytest.mark.parametrize("groups", [(0, 1, 1, 2, 3), (3, 1, 0, 1, 2), (2, 2, 2, 2, 2), (0, 3, 0, 3, 0)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_and_gradients_equal_a_loop_over_members(setting, groups):
    net, groups = network(setting).double(), torch.tensor(groups)
    x = torch.randn(5, 3, 3, dtype=torch.double, requires_grad=True)
    weights = torch.randn(5, 1, dtype=torch.double)
    ummrm.assign_groups(net, groups)
    out = net(x)
    inputs = [x, *net.parameters()]
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    parts = {e: (groups == e).nonzero()[:, 0] for e in range(E)}
    looped = torch.empty_like(out)
    for e, rows in parts.items():
        if len(rows):
            looped = looped.index_copy(0, rows, of_member(net, x, rows, e))
    torch.testing.assert_close(out, looped)
    expected = torch.autograd.grad((looped * weights).sum(), inputs, materialize_grads=True, allow_unused=True)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("setting", SETTINGS)
def test_members_and_their_merge(setting):
    net = network(setting).eval()
    x = torch.randn(6, 2, 3)
    scores = torch.stack([net(x)[:, 0] for _ in ummrm.members(net)], dim=-1)
    assert scores.shape == (6, E) and scores.std(1).min() > 1e-4
    for e in range(E):
        ummrm.set_evaluation(net, e)
        torch.testing.assert_close(net(x)[:, 0], scores[:, e])
    ummrm.set_evaluation(net, "mean")
    with pytest.raises(ValueError, match="set_evaluation.*ummrm.members"):
        net(x)
    merged = ummrm.merge(net)
    assert not any("ummrm" in type(m).__module__ for m in merged.modules())
    # the mixture is left as it is, and the merge phase computes the same
    torch.testing.assert_close(torch.stack([net(x)[:, 0] for _ in ummrm.members(net)], dim=-1), scores)
    torch.testing.assert_close(ummrm.prepare_merge(net)(x), merged(x))
    config = SETTINGS[setting]
    share = config.fixed_shared_weight if config.num_shared_experts else 0.0
    coefficients = ummrm.merge_coefficients(net)["ffns.0"][0]
    S = config.num_shared_experts
    expected = [share / max(S, 1)] * S + [(1 - share) / E] * E
    torch.testing.assert_close(coefficients, torch.tensor(expected))


def test_upcycling_is_exact():
    dense = Tokens().eval()
    x = torch.randn(5, 2, 3)
    expected = dense(x)
    for setting in (
        UpcycleConfig(assignment="sequence"),
        UpcycleConfig(assignment="sequence", num_experts=3, num_shared_experts=1),
    ):
        net = copy.deepcopy(dense)
        for i, ffn in enumerate(net.ffns):
            net.ffns[i] = UpcycledFFN.from_dense(ffn, setting)
        ummrm.assign_groups(net, torch.tensor([0, 2, 1, 2, 0]))
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ummrm.merge(net)(x), expected, rtol=1e-5, atol=1e-6)


def test_a_plain_training_loop_with_one_call_a_step():
    """Bradley-Terry on pairs of rows, twice: the same network bit for bit, and the loss falls."""

    def train():
        torch.manual_seed(5)
        net = network().train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        data = torch.randn(64, 2, 2, 3)
        data[:, 0] += 0.5
        losses = []
        for step in range(40):
            chosen, rejected = data[step % 4 * 16 :][:16].unbind(1)
            groups = ummrm.draw_groups(16, E, seed=0, step=step)
            ummrm.assign_groups(net, groups.repeat(2))
            rewards = net(torch.cat([chosen, rejected])).squeeze(-1)
            loss = ummrm.preference_loss(*rewards.chunk(2)) + ummrm.auxiliary_loss(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return net, losses

    (net, losses), (again, _) = train(), train()
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    for parameter, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_copies_and_pickles_carry_no_groups():
    net = network()
    ummrm.assign_groups(net, torch.tensor([1, 0]))
    net(torch.randn(2, 2, 3))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(ValueError, match="`groups` must say in training"):
            other(torch.randn(2, 2, 3))


# ---- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (torch.tensor([0, 1, 4]), IndexError, r"\[0, 4\), got 4"),
        (torch.tensor([0, -1, 2]), IndexError, "got -1"),
        (torch.tensor([0.0, 1.0, 2.0]), ValueError, "integer tensor"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"got torch.int64 \[1, 3\]"),
        ([0, 1, 2], ValueError, "got list"),
    ],
    ids=["too large", "negative", "float", "matrix", "list"],
)
def test_groups_that_are_none(groups, error, message):
    with pytest.raises(error, match=message):
        ummrm.assign_groups(network(), groups)


def test_groups_must_fit_the_batch_and_be_given_in_training():
    net = network()
    with pytest.raises(ValueError, match="`groups` must say in training.*assign_groups.*draw_groups"):
        net(torch.randn(3, 2, 3))
    ummrm.assign_groups(net, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"one expert for each row of the batch, got 2 for an input of \[3, 2"):
        net(torch.randn(3, 2, 3))
    with pytest.raises(ValueError, match=r"got 2 for an input of \[4, 1, "):  # a multiple is no fit
        net(torch.randn(4, 1, 3))
    flat = UpcycledFFN.from_dense(nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3)), FFN)
    ummrm.assign_groups(flat, torch.tensor([0, 1]))
    assert flat(torch.randn(2, 3)).shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"got 2 for an input of \[4, 3\].*groups.repeat\(2\)"
    ):  # both answers of a pair
        flat(torch.randn(4, 3))
    ummrm.assign_groups(net, None)
    with pytest.raises(ValueError, match="got None"):
        net(torch.randn(2, 2, 3))


def test_seeds_of_any_size_differ_and_others_are_refused():
    drawn = [ummrm.draw_groups(64, 4, seed=seed, step=1).tolist() for seed in (0, 2**32, 2**40, 2**63 - 1, 1)]
    assert len({tuple(one) for one in drawn}) == 5
    for seed in (0.5, None, "1"):
        with pytest.raises(TypeError, match="`seed` must be an integer"):
            ummrm.draw_groups(4, 4, seed=seed, step=0)


@pytest.mark.parametrize("call", [lambda n: ummrm.assign_groups(n, None), lambda n: list(ummrm.members(n))])
def test_a_network_without_such_experts(call):
    by_token = nn.Sequential(UpcycledFFN.from_dense(TwoLayer().ffns[0], UpcycleConfig()))
    for net in (nn.Linear(HIDDEN, 1), by_token):
        with pytest.raises(TypeError, match='experts assigned by sequence.*assignment="sequence"'):
            call(net)


@pytest.mark.parametrize("evaluation", [4, -1, "best", True, 1.0])
def test_an_evaluation_that_is_none(evaluation):
    net = network()
    with pytest.raises(ValueError, match='`evaluation` must be "mean" or the number of a member, 0 to 3'):
        ummrm.set_evaluation(net, evaluation)


def test_a_linear_layer_needs_its_setting():
    with pytest.raises(ValueError, match='experts_in="linear" or "all", got assignment=.sequence. and experts_in=.ffn'):
        UpcycledLinear.from_dense(nn.Linear(3, 2), FFN)
    with pytest.raises(TypeError, match="`linear` must be an nn.Linear, got ReLU"):
        UpcycledLinear.from_dense(nn.ReLU(), SETTINGS["linear"])
