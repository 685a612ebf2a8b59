"""What only a process started with TRITON_INTERPRET=1 can show; test_triton.py starts it. The interpreter's bf16 is
torch's, what is fused has the bits of what is not, and a model is upcycled, trained and merged with every operator of
the FFN on Triton's kernels.
"""

import collections
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from op_inputs import floats, moe_inputs
from test_merged_ffn import merged_inputs
from test_moe_ffn import NEED, in_order
from tiny_models import outputs_of, padded_batch, perturb_experts, tiny_model
from tolerances import compare
from triton.runtime.errors import InterpreterError

import ummrm
from ummrm import MergeConfig, UpcycleConfig, auxiliary_loss, ops, preference_loss
from ummrm.ops import backends, composed_reference, reference

kernels = backends.load_triton()
moe = importlib.import_module("ummrm.ops.triton_kernels.moe_ffn")


@triton.jit
def _cast(source, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(source + i).to(out.dtype.element_ty))


@triton.jit
def _double(source, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(source + i)
    tl.store(source + i, x + x)


@triton.jit
def _product(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def run(kernel, *arguments, size):
    kernel[(1,)](*arguments, SIZE=size)


def test_bf16_rounds_to_nearest_even_and_widens_exactly():
    assert kernels.INTERPRETED
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40]
    x = torch.cat([torch.tensor(special), torch.randn(1024 - len(special)) * 100])
    narrow, wide = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    run(_cast, x, narrow, size=1024)
    assert torch.equal(narrow.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:]) and narrow[0].isnan()
    run(_cast, narrow, wide, size=1024)
    assert torch.equal(wide[1:], narrow.float()[1:]) and wide[0].isnan()


def test_bf16_products_are_of_values():
    a, b, out = floats(32, 32, dtype=torch.bfloat16), floats(32, 32, dtype=torch.bfloat16), torch.empty(32, 32)
    run(_product, a, b, out, size=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_other_arithmetic_on_bf16_is_an_error():
    with pytest.raises(InterpreterError, match="arithmetic on bfloat16"):
        run(_double, torch.ones(16, dtype=torch.bfloat16), size=16)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_that_fills_no_tile(dtype):
    """More than a tile of everything, masked tokens, an expert without rows, two shared experts; and its merge."""
    logits = floats(150, 9, dtype=dtype, requires_grad=True, scale=2)
    compare(ops.route, reference.route, {"logits": logits, "top_k": 3, "mask": torch.rand(150) < 0.7})
    for kind in ("some_dead", "hole"):
        arguments = moe_inputs(45, 37, 35, 5, 2, 2, kind=kind, dtype=dtype)
        compare(ops.moe_ffn, composed_reference.moe_ffn, arguments, floor_dtype=dtype, roundings=4)
    arguments = merged_inputs(45, 37, 35, 3, 2, dtype=dtype)
    compare(ops.merged_ffn, composed_reference.merged_ffn, arguments, floor_dtype=dtype, roundings=4)


def launched(monkeypatch):
    """The names of the kernels that run from here on, and how often."""
    names, executor = collections.Counter(), triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def noted(self, *arguments, **options):
        names[self.fn.__name__] += 1
        return call(self, *arguments, **options)

    monkeypatch.setattr(executor, "__call__", noted)
    return names


def fusions():
    return moe.Fusion(gather=False, epilogue=False), moe.Fusion(gather=True, epilogue=False), moe.FUSED


@pytest.fixture
def ordered_dots(monkeypatch):
    """Dots that are summed in fp64 and rounded once: the interpreter's are numpy's, whose order of addition follows the
    shape of the tile, so that now and then a sum next to a boundary is rounded the other way."""
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: matmul(a, b, dtype=np.float64).astype(dtype))


@pytest.mark.usefixtures("poisoned", "ordered_dots")
@pytest.mark.parametrize(
    ("glu", "kind", "s", "dtype"),
    [(True, "silu", 2, torch.bfloat16), (False, "gelu", 1, torch.float32), (True, "relu2", 0, torch.float16)],
    ids=str,
)
def test_every_way_of_fusing_gives_the_same_bits(glu, kind, s, dtype):
    """More than a tile of rows and columns, an expert without rows, rows of no expert, slots that repeat an expert."""
    arguments = moe_inputs(35, 34, 20, 3, 2, s, glu, kind="some_dead", dtype=dtype, requires_grad=False)
    indices = arguments["expert_indices"]
    indices[indices == 1] = 2
    tensors = in_order(arguments, kind, glu)
    grad = torch.randn_like(arguments["x"])
    need = [True] * len(NEED)
    results = []
    for fusion in fusions():
        out, *saved = moe.run_forward(*tensors, need_pre_activation=True, fusion=fusion)
        grads = moe.run_backward(grad, *tensors[:12], *saved, kind, glu, need, fusion=fusion)
        results.append([out, *saved, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    out, nothing, *_ = moe.run_forward(*tensors, need_pre_activation=False)
    assert nothing is None and torch.equal(out, results[0][0])


@pytest.mark.usefixtures("poisoned")
def test_descriptors_give_the_same_bits(monkeypatch):
    """Where they cannot be made, projections are read without; sizes that fill no tile."""
    seen = []

    def launch(kernel, *arguments, **options):
        seen.append(options.get("TMA"))
        return launched_by(kernel, *arguments, **options)

    names = "expert_gemm", "up_activation", "configurations"
    gemm, up, configurations = (importlib.import_module(f"ummrm.ops.triton_kernels.{name}") for name in names)
    launched_by = gemm.launch
    for module in (gemm, up):
        monkeypatch.setattr(module, "launch", launch)
    (plain,) = configurations.candidates("interpreter", torch.bfloat16)
    configuration = replace(plain, tma=True)
    for (h, i), can in (((24, 40), True), ((22, 20), False)):
        tensors = in_order(moe_inputs(9, h, i, 2, 1, 1, dtype=torch.bfloat16, requires_grad=False))
        grad, need = torch.randn_like(tensors[0]), [True] * len(NEED)

        def both(tensors=tensors, grad=grad, need=need):
            out, *saved = moe.run_forward(*tensors, need_pre_activation=True)
            return [out, *moe.run_backward(grad, *tensors[:12], *saved, "silu", True, need)]

        want = both()
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "choose", lambda *arguments: configuration)
            patch.setattr(moe, "choose_fused", lambda *arguments: configuration)
            for a, b in zip(want, both(), strict=True):
                if a.dtype == torch.bfloat16:
                    assert torch.equal(a, b)
                else:  # gates' gradients, sums over a row, which numpy was once seen to add in another order
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert (True in seen) == can


@pytest.mark.usefixtures("poisoned")
def test_without_a_shared_expert():
    arguments = moe_inputs(19, 12, 10, 4, 2, 0, kind="some_dead")
    compare(ops.moe_ffn, composed_reference.moe_ffn, arguments, roundings=4)


def test_what_is_fused_is_not_launched(monkeypatch):
    """Nor are gradients of what is frozen."""
    names, arguments = launched(monkeypatch), moe_inputs(9, 5, 4, 3, 2, 1)
    with torch.no_grad():
        ops.moe_ffn(**arguments)
    assert names == {
        "_sort_count": 1,
        "_sort_scan": 1,
        "_sort_scatter": 1,
        "_up_activation": 1,
        "_expert_gemm": 1,
        "_unpermute": 1,
    }

    def backward(*trained):
        inputs = {n: v.detach().requires_grad_(n in trained) for n, v in arguments.items() if v.is_floating_point()}
        out = ops.moe_ffn(**arguments | inputs).sum()
        names.clear()
        out.backward()
        assert {n for n in NEED if inputs[n].grad is not None} == set(trained)
        return dict(names)

    everything = {"_expert_gemm": 2, "_activation_backward": 1, "_gate_grad": 1, "_wgrad": 2, "_bias_grad": 2}
    assert backward(*NEED) == everything | {"_unpermute": 1}
    router = {"_expert_gemm": 2, "_activation_backward": 1, "_gate_grad": 1, "_unpermute": 1}
    assert backward("x", "shared_weight", "routed_weights") == router
    assert backward("routed_weights") == {"_expert_gemm": 1, "_activation_backward": 1, "_gate_grad": 1}
    assert backward("shared_down") == {"_expert_gemm": 1, "_activation_backward": 1, "_wgrad": 1}
    assert backward("shared_up") == {"_expert_gemm": 1, "_activation_backward": 1, "_wgrad": 1}
    assert backward("routed_down_bias") == {"_bias_grad": 1}


def test_more_slots_than_32_bits_count_are_refused():
    """A block's first slot and its length add up to less than 2^31; the tensor behind this is one row."""
    indices = torch.zeros(1, 2**11, dtype=torch.int32).expand(2**20 - 31, 2**11)
    for call in (
        lambda: kernels.KERNELS["sort_slots"](indices, 3),
        lambda: kernels.KERNELS["route"](torch.zeros(1, 1).expand(indices.numel(), 1), None, None, 1, "fixed", 0.5),
        lambda: kernels.KERNELS["permute"](torch.zeros(1, 1).expand(indices.numel(), 1), indices, indices, 1),
    ):
        with pytest.raises(ValueError, match=r"must have .*at most 2\^31 - 2\^16.*got"):
            call()


def test_upcycle_train_merge(monkeypatch):
    """Under bf16 autocast, as trainers run; every kernel takes part. The merged model is the one that was trained."""
    names = launched(monkeypatch)
    assert backends.backend_for("cpu") == "triton"
    config = UpcycleConfig(
        num_experts=3, num_experts_per_tok=2, router_init_std=0.5, balancing_loss_coef=0.1, z_loss_coef=0.1
    )
    moe = perturb_experts(ummrm.upcycle(tiny_model("gpt_neox"), config)).train()
    chosen, rejected = padded_batch(lengths=(5, 3)), padded_batch(lengths=(4, 2), side="left")

    def step(model, optimizer, extra):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = preference_loss(model(**chosen).logits, model(**rejected).logits) + extra(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    router = moe.gpt_neox.layers[0].mlp.router.weight
    before = router.detach().clone()
    optimizer = torch.optim.SGD([p for p in moe.parameters() if p.requires_grad], lr=0.02)
    losses = [step(moe, optimizer, auxiliary_loss) for _ in range(2)]
    assert losses[-1] < losses[0] and not torch.equal(router, before)

    moe = ummrm.prepare_merge(moe, MergeConfig())
    alphas = [p for p in moe.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(alphas, lr=0.1)
    step(moe, optimizer, lambda model: 0.0)
    assert all(a.detach().abs().max() > 0.05 for a in alphas)  # Adam's first step; one step need not lower a bf16 loss
    moe.eval()
    want = outputs_of(moe, chosen)
    torch.testing.assert_close(outputs_of(ummrm.merge(moe), chosen), want, rtol=1e-4, atol=1e-5)
    assert set(names) == {
        "_route",
        "_route_statistics",
        "_route_backward",
        "_sort_count",
        "_sort_scan",
        "_sort_scatter",
        "_unpermute",
        "_up_activation",
        "_expert_gemm",
        "_gate_grad",
        "_wgrad",
        "_bias_grad",
        "_activation",
        "_activation_backward",
        "_merge",
        "_dots",
        "_dots_sum",
    }


def test_by_sequence(monkeypatch):
    """Experts in every linear layer, out of order and one without a row: no routing, no permutation."""
    names = launched(monkeypatch)
    config = UpcycleConfig(assignment="sequence", num_experts=3, experts_in="linear", layers=(1,))
    moe, batch = perturb_experts(ummrm.upcycle(tiny_model("gpt_neox"), config)).train(), padded_batch(lengths=(4, 2))
    groups = torch.tensor([2, 0])

    def step(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, groups=groups).logits.float().square().sum()
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    got = step(moe)
    assert set(names) == {"_expert_gemm", "_wgrad", "_bias_grad", "_activation", "_activation_backward"}
    backends.use_backend("reference")
    expected = step(moe)
    backends.use_backend("triton")
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3, name
        if "expert" in name:
            assert got[name][1].abs().max() == 0 and got[name][2].abs().max() > 0, name

    moe = ummrm.prepare_merge(moe.eval())
    torch.testing.assert_close(outputs_of(ummrm.merge(moe), batch), outputs_of(moe, batch), rtol=1e-4, atol=1e-5)
    assert {"_merge"} <= set(names)
