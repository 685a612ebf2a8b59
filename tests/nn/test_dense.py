"""Reading a dense FFN: structure is recognised, proven by output, and anything else is a clear error."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ummrm import FFNPaths
from ummrm.nn.dense import apply_ffn, register_transposed_linear
from ummrm.nn.probe import find_paths, prove_paths
from ummrm.ops.reference import ACTIVATIONS


class Gated(nn.Module):
    """Projections under names that say nothing, in an order that misleads."""

    def __init__(self, act, gate="b", bias=False, hidden=10, intermediate=18):
        super().__init__()
        self.act, self.gate_name = act, gate
        self.a = nn.Linear(hidden, intermediate, bias=bias)
        self.b = nn.Linear(hidden, intermediate, bias=bias)
        self.c = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x):
        gate, up = (self.a, self.b) if self.gate_name == "a" else (self.b, self.a)
        return self.c(self.act(gate(x)) * up(x))


def plain(act, hidden=10, intermediate=18):
    return nn.Sequential(nn.Linear(hidden, intermediate), act, nn.Linear(intermediate, hidden))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_ffns_are_recognised(name, gate, dtype):
    paths = find_paths(Gated(ACTIVATIONS[name], gate).to(dtype))
    assert paths == FFNPaths(gate=gate, up="b" if gate == "a" else "a", down="c", activation=name)


@pytest.mark.parametrize(
    ("name", "act"),
    [("silu", nn.SiLU()), ("gelu", nn.GELU()), ("gelu_tanh", nn.GELU(approximate="tanh")), ("relu", nn.ReLU())],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_plain_ffns_are_recognised_at_any_weight_scale(name, act, scale):
    ffn = plain(act)
    with torch.no_grad():
        for p in ffn.parameters():
            p.mul_(scale)
    assert find_paths(ffn) == FFNPaths(up="0", down="2", activation=name)


class Fused(nn.Module):
    """Gate and up in one module, in either order; the down projection transposed."""

    def __init__(self, act, gate_first, bias):
        super().__init__()
        self.act, self.gate_first = act, gate_first
        self.up_gate, self.back = nn.Linear(10, 36, bias=bias), Conv1D(10, 18)

    def forward(self, x):
        first, second = self.up_gate(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.back(self.act(gate) * up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_and_transposed_projections_are_recognised_and_written(name, gate_first, bias):
    ffn = Fused(ACTIVATIONS[name], gate_first, bias)
    first, second = ("gate", "up") if gate_first else ("up", "gate")
    halves = {first: "up_gate[0]", second: "up_gate[1]"}
    paths = find_paths(ffn)
    assert paths == FFNPaths(**halves, down="back", activation=name) and paths.modules == ("up_gate", "back")
    dense = paths.read(ffn)
    fused, weight, x = dense.fused(), ffn.up_gate.weight, torch.randn(3, 10)
    assert torch.equal(fused["up"], weight if gate_first else torch.cat([weight[18:], weight[:18]]))
    assert torch.equal(fused["down"], ffn.back.weight.t()) and dense.down.weight.shape == (10, 18)
    torch.testing.assert_close(apply_ffn(x, dense, name), ffn(x))
    target = Fused(ACTIVATIONS[name], gate_first, bias)
    paths.read(target).write(fused)
    assert all(torch.equal(v, ffn.state_dict()[k]) for k, v in target.state_dict().items())
    assert all(
        p.is_contiguous() and p.shape == q.shape for p, q in zip(target.parameters(), ffn.parameters(), strict=True)
    )


def test_a_linear_map_is_known_once_it_is_registered(monkeypatch):
    class Transposed(Conv1D):
        pass

    monkeypatch.setattr("ummrm.nn.dense._transposed", [])
    ffn, paths = nn.Sequential(Transposed(18, 10), nn.SiLU(), nn.Linear(18, 10)), FFNPaths(up="0", down="2")
    with pytest.raises(ValueError, match="`up` must be the path of an nn.Linear .*got '0', a Transposed"):
        paths.read(ffn)
    register_transposed_linear(Transposed)
    assert paths.read(ffn).spec.up_rows == 18


class FunctionalDropout(Gated):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.2, self.training)


def test_dropout_that_is_no_module_is_found_by_training():
    ffn = FunctionalDropout(F.silu)
    before = torch.get_rng_state()
    for recognise in (find_paths, lambda f: prove_paths(f, FFNPaths(gate="b", up="a", down="c"))):
        with pytest.raises(ValueError, match=r"must compute the same in training .*FunctionalDropout does not"):
            recognise(ffn)
    assert torch.equal(torch.get_rng_state(), before), "probing draws no numbers from the user's generator"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (FFNPaths(gate="up_gate[0]", up="up_gate[0]", down="back"), "got a half without the other, or a module twice"),
        (FFNPaths(up="up_gate[0]", down="back"), "got a half without the other"),
        (FFNPaths(gate="up_gate[0]", up="up_gate", down="back"), "or a module twice"),
        (FFNPaths(gate="up_gate[0]", up="up_gate[2]", down="back"), r"\[0\] or \[1\] after it .*got 'up_gate\[2\]'"),
    ],
)
def test_wrong_halves_are_a_clear_error(paths, message):
    with pytest.raises(ValueError, match=message):
        paths.read(Fused(F.silu, True, True))


def test_odd_outputs_have_no_halves():
    with pytest.raises(ValueError, match="got '0', whose 9 outputs have no halves"):
        FFNPaths(gate="0[0]", up="0[1]", down="2").read(plain(nn.ReLU(), intermediate=9))


def test_square_projections_are_told_apart():
    assert find_paths(plain(nn.ReLU(), hidden=8, intermediate=8)) == FFNPaths(up="0", down="2", activation="relu")


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Reshaping(Gated):
    def forward(self, x):
        return super().forward(x)[:1]


def zeroed():
    ffn = plain(nn.ReLU())
    for p in ffn.parameters():
        nn.init.zeros_(p)
    return ffn


NOT_UPCYCLABLE = [
    (nn.Linear(4, 4), r"two \(plain\) or three \(gated\) nn.Linear .*Linear with 1"),
    (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)),
        "map its hidden size onto itself .*0: 4 to 8, 2: 8 to 5",
    ),
    (plain(nn.Tanh()), "computes something else: the closest candidate"),
    (Residual(F.silu), "computes something else"),
    (
        Reshaping(F.silu),
        r"must be callable with one tensor \[tokens, hidden\] and return that shape; Reshaping .*\(10\)",
    ),
    (
        nn.Sequential(*plain(nn.ReLU()), nn.Dropout(0.1)),
        "must hold no active dropout, got Sequential with dropout at 3",
    ),
    (zeroed(), "two readings of Sequential fit"),
    (plain(nn.ReLU()).to("meta"), "must hold real weights to be recognised"),
]


@pytest.mark.parametrize(("ffn", "message"), NOT_UPCYCLABLE)
def test_what_is_no_ffn_is_a_clear_error(ffn, message):
    with pytest.raises(ValueError, match=message):
        find_paths(ffn)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            FFNPaths(up="a", down="missing"),
            r"`down` must be the path of an nn.Linear below Gated, got 'missing'.*a, b, c",
        ),
        (FFNPaths(up="a", down=""), r"`down` must be the path of an nn.Linear below Gated, got '', a Gated"),
        (FFNPaths(up="a", gate="c", down="b"), r"the `gate` projection must be \[18, 10\]"),
        (FFNPaths(up="a", down="c", activation="mish"), r"`activation` must be one of silu, .*got 'mish'"),
    ],
)
def test_wrong_paths_are_a_clear_error(paths, message):
    with pytest.raises(ValueError, match=message):
        paths.read(Gated(F.silu))


def test_one_sided_biases_are_refused():
    ffn = Gated(F.silu)
    ffn.a = nn.Linear(10, 18, bias=True)
    with pytest.raises(ValueError, match="both have a bias or both have none"):
        FFNPaths(gate="a", up="b", down="c").read(ffn)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_and_write_are_inverse(bias):
    source, target = Gated(F.silu, bias=bias), Gated(F.silu, bias=bias)
    paths = FFNPaths(gate="b", up="a", down="c")
    fused = paths.read(source).fused()
    assert torch.equal(fused["up"], torch.cat([source.b.weight, source.a.weight]))
    paths.read(target).write(fused)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    assert all(p.is_contiguous() and p.data_ptr() != fused["up"].data_ptr() for p in target.parameters())
    x = torch.randn(3, 10)
    torch.testing.assert_close(apply_ffn(x, paths.read(target), "silu"), source(x))
