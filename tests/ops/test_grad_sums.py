"""Weight gradients added to what is there: the operators, and `accumulate_in_place` around a backward."""

import collections

import pytest
import torch
from op_inputs import composed_on_the_cpu, expert_indices, floats, gate_dtype, moe_inputs
from tolerances import DTYPES, assert_close_to_truth, to_double
from torch.utils.checkpoint import checkpoint

from ummrm import ops
from ummrm.ops import reference

poisoned = pytest.mark.usefixtures("poisoned")
raw = torch.ops.ummrm
SIZES = [(1, 1, 1, 1, 1, 1), (3, 5, 7, 1, 1, 2), (9, 4, 3, 4, 4, 1), (17, 13, 6, 7, 3, 3), (33, 32, 24, 5, 2, 0)]
KINDS = ("random", "first", "hole", "some_dead", "all_dead")
PROJECTIONS = ("shared_up", "routed_up", "shared_down", "routed_down")


class Calls(collections.Counter):
    """How often each of the operators is called in a `with` block."""

    def __enter__(self):
        self._profile = torch.profiler.profile().__enter__()
        return self

    def __exit__(self, *exception):
        self._profile.__exit__(*exception)
        self.update(e.name.removeprefix("ummrm::") for e in self._profile.events() if e.name.startswith("ummrm::"))


def wgrad_inputs(t, d, n, e, k, s, kind, dtype, copies):
    offsets = ops.sort_slots(expert_indices(t, e, k, kind), e)[2]
    rows = floats((s if copies or s == 0 else 1) * t, d, dtype=dtype), floats(t * k, d, dtype=dtype)
    return (floats(s * t, n, dtype=dtype), floats(t * k, n, dtype=dtype), *rows, offsets, t, s)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_reference(backend, dtype):
    """Sums in the rows' dtype and wider, of either kind of expert or both; what has no rows keeps what it held."""
    for kind, (t, d, n, e, k, s) in zip(KINDS, SIZES, strict=True):
        inputs = wgrad_inputs(t, d, n, e, k, s, kind, dtype, copies=t % 2 == 0)
        for wanted in {dtype, gate_dtype(dtype)}:
            before = floats(s, n, d, dtype=wanted), floats(e, n, d, dtype=wanted)
            for needs in ((True, True), (True, False), (False, True)):
                sums, plain = (
                    [b.clone() if need else None for b, need in zip(before, needs, strict=True)] for _ in "12"
                )
                truth = to_double(sums)
                raw.expert_gemm_wgrad_add(*inputs, *sums)
                reference.expert_gemm_wgrad_add(*inputs, *plain)
                reference.expert_gemm_wgrad_add(*to_double(inputs), *truth)
                for i in range(2):
                    if needs[i] and truth[i].numel():
                        assert_close_to_truth(sums[i], plain[i], truth[i], f"sum {i}", dtype, roundings=2)
            unused = inputs[4].diff() == 0
            assert torch.equal(sums[1][unused], before[1][unused])


@poisoned
def test_nan_in_rows_of_no_expert(backend):
    inputs = wgrad_inputs(20, 6, 5, 4, 2, 1, "some_dead", torch.float32, False)
    live = int(inputs[4][-1])
    inputs[1][live:], inputs[3][live:] = float("nan"), float("nan")
    sums = floats(1, 5, 6), floats(4, 5, 6)
    raw.expert_gemm_wgrad_add(*inputs, *sums)
    assert all(total.isfinite().all() for total in sums)


def test_wrong_sums_are_refused():
    inputs = wgrad_inputs(4, 6, 5, 3, 2, 1, "random", torch.float32, False)
    good = floats(1, 5, 6), floats(3, 5, 6)
    raw.expert_gemm_wgrad_add(*inputs, *good)
    for i, name in enumerate(("shared_sum", "routed_sum")):
        for wrong, error, words in (
            (good[i][:, :4].contiguous(), ValueError, "must have shape .*pass a buffer of the projection's shape"),
            (good[i].bfloat16(), TypeError, "must be float32, got bfloat16"),
            (good[i].mT.contiguous().mT, ValueError, "must be contiguous, got strides"),
        ):
            sums = [wrong if i == j else good[j] for j in range(2)]
            with pytest.raises(error, match=f"ummrm.expert_gemm_wgrad_add: `{name}` {words}"):
                raw.expert_gemm_wgrad_add(*inputs, *sums)
            with pytest.raises(error, match=f"`{name}`"):
                raw.expert_gemm_wgrad_add(*(t.to("meta") if torch.is_tensor(t) else t for t in (*inputs, *sums)))


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = wgrad_inputs(5, 3, 4, 3, 2, 1, "hole", dtype, False)
        for sums in ((floats(1, 4, 3), floats(3, 4, 3)), (None, floats(3, 4, 3))):
            torch.library.opcheck(raw.expert_gemm_wgrad_add.default, (*inputs, *sums))


def layer(dtype=torch.float32):
    return moe_inputs(t=11, h=8, i=6, e=4, k=2, s=1, kind="hole", dtype=dtype)


def backward(inputs, batches=3, after=lambda batch: None):
    """Backward of so many micro-batches of different x, the same ones at every call."""
    generator = torch.Generator().manual_seed(5)
    for batch in range(batches):
        x = torch.randn(inputs["x"].shape, generator=generator, dtype=torch.float64).to(inputs["x"].dtype)
        out = ops.moe_ffn(**inputs | {"x": x})
        (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum().backward()
        after(batch)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_is_added_to_in_place(backend, dtype):
    """The sums of plain accumulation."""
    inputs = layer(dtype)
    names = [name for name, value in inputs.items() if value.requires_grad and name != "x"]
    backward(inputs)
    plain = {name: inputs[name].grad for name in names}
    doubled = {n: to_double(v) for n, v in inputs.items()}
    backward(doubled)
    for name in names:
        inputs[name].grad = None
    with ops.accumulate_in_place():
        backward(inputs)
    for name in names:
        assert_close_to_truth(inputs[name].grad, plain[name], doubled[name].grad, name, dtype, roundings=4)


def test_the_product_adds():
    """From the second micro-batch on no gradient of a projection is returned, and the first one's tensor stays."""
    with composed_on_the_cpu():
        hold_to_calls()


def hold_to_calls():
    inputs = layer()
    with ops.accumulate_in_place():
        with Calls() as calls:
            backward(inputs, batches=1)
        assert calls["expert_gemm_wgrad"] == 2 and calls["expert_gemm_wgrad_add"] == 0
        first = {name: inputs[name].grad.data_ptr() for name in PROJECTIONS}
        with Calls() as calls:
            backward(inputs, batches=2)
    assert calls["expert_gemm_wgrad"] == 0 and calls["expert_gemm_wgrad_add"] == 4
    assert {name: inputs[name].grad.data_ptr() for name in PROJECTIONS} == first
    with Calls() as calls:
        backward(inputs, batches=1)
    assert calls["expert_gemm_wgrad"] == 2 and calls["expert_gemm_wgrad_add"] == 0


@poisoned
def test_main_grad_in_fp32(backend):
    """Of a bf16 layer: nearer the sum of the micro-batches' gradients than bf16's own sums, and `.grad` stays None."""
    inputs, batches = layer(torch.bfloat16), 40
    for name in PROJECTIONS:
        inputs[name].main_grad = torch.zeros_like(inputs[name], dtype=torch.float32)
    with ops.accumulate_in_place():
        backward(inputs, batches=batches)
    assert all(inputs[name].grad is None for name in PROJECTIONS) and inputs["routed_up_bias"].grad is not None
    plain, single = ({n: recorded(v) for n, v in inputs.items()} for _ in "12")
    backward(plain, batches=batches)
    totals = dict.fromkeys(PROJECTIONS, 0.0)

    def add_and_forget(batch):
        for name in PROJECTIONS:
            totals[name] = totals[name] + single[name].grad.double()
            single[name].grad = None

    backward(single, batches=batches, after=add_and_forget)
    for name in PROJECTIONS:
        errors = [(g.double() - totals[name]).norm() for g in (inputs[name].main_grad, plain[name].grad)]
        assert errors[0] < 0.5 * errors[1], (name, errors)
    assert inputs["routed_up"].main_grad[0].eq(0).all()  # an expert that no token chose


def recorded(value):
    return value.detach().clone().requires_grad_(value.requires_grad)


@poisoned
def test_some_have_a_buffer_and_others_not(backend):
    """Frozen, with `main_grad` of either dtype, with `.grad`, and with none, each in one backward."""
    inputs = layer(torch.bfloat16)
    plain = {name: recorded(value) for name, value in inputs.items()}
    for each in (inputs, plain):
        each["shared_up"].requires_grad_(False)
    inputs["routed_up"].main_grad = torch.zeros_like(inputs["routed_up"])
    inputs["shared_down"].main_grad = torch.zeros_like(inputs["shared_down"], dtype=torch.float32)
    with ops.accumulate_in_place():
        backward(inputs, batches=1)
    backward(plain, batches=1)
    assert inputs["shared_up"].grad is None and inputs["routed_up"].grad is None
    for name, got in (
        ("routed_up", inputs["routed_up"].main_grad),
        ("shared_down", inputs["shared_down"].main_grad),
        ("routed_down", inputs["routed_down"].grad),
        ("x_weight", inputs["routed_weights"].grad),
    ):
        want = plain["routed_weights" if name == "x_weight" else name].grad
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)


@poisoned
@pytest.mark.parametrize("transpose", [False, True])
def test_expert_gemm_and_grouped_linear(backend, transpose):
    offsets = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    proj, shared = floats(3, 4, 5, requires_grad=True), floats(1, 4, 5, requires_grad=True)
    width = 4 if transpose else 5

    def run(each):
        for _ in range(2):
            torch.manual_seed(3)
            out = ops.expert_gemm(
                floats(6, width), floats(9, width), each[0], each[1], offsets, 6, transpose=transpose
            ).square()
            if not transpose:
                out = out.sum() + ops.grouped_linear(floats(9, width), each[1], offsets).square().sum()
            out.sum().backward()

    plain = recorded(shared), recorded(proj)
    run(plain)
    shared.main_grad, proj.main_grad = torch.zeros_like(shared), torch.zeros_like(proj)
    with ops.accumulate_in_place(), Calls() as calls:
        run((shared, proj))
    assert calls["expert_gemm_wgrad"] == 0 and shared.grad is proj.grad is None
    for ours, theirs in ((shared, plain[0]), (proj, plain[1])):
        torch.testing.assert_close(ours.main_grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    """A node's saved tensors are then others than its inputs."""
    inputs = layer()
    plain = {name: recorded(value) for name, value in inputs.items()}
    for each, context in ((plain, None), (inputs, ops.accumulate_in_place)):
        for name in PROJECTIONS:
            each[name].grad = torch.ones_like(each[name])
        before = {name: each[name].grad.data_ptr() for name in PROJECTIONS}

        def run(x, each=each):
            return ops.moe_ffn(**each | {"x": x})

        def step(each=each, run=run):
            checkpoint(run, each["x"], use_reentrant=reentrant).square().sum().backward()

        if context is None:
            with composed_on_the_cpu():  # as the other, of which equal sums are asked
                step()
        else:
            with context(), composed_on_the_cpu(), Calls() as calls:
                step()
            assert calls["expert_gemm_wgrad_add"] == 2 and calls["expert_gemm_wgrad"] == 0
            assert {name: each[name].grad.data_ptr() for name in PROJECTIONS} == before
    for name in PROJECTIONS:
        torch.testing.assert_close(inputs[name].grad, plain[name].grad)


def test_what_goes_autograds_way():
    """Hooks, a tensor made of the parameter, recorded gradients, torch.compile: gradients come as always."""
    seen = []
    for prepare in ("hook", "post hook", "scaled", "create_graph", "compiled", "strided"):
        inputs = layer()
        plain = {name: recorded(value) for name, value in inputs.items()}
        for each in (inputs, plain):
            each["routed_up"].grad = torch.ones_like(each["routed_up"])
        used, function = dict(inputs), ops.moe_ffn
        if prepare == "hook":
            inputs["routed_up"].register_hook(lambda grad: seen.append(grad))
        elif prepare == "post hook":
            inputs["routed_up"].register_post_accumulate_grad_hook(lambda p: seen.append(p))
        elif prepare == "scaled":
            used["routed_up"] = inputs["routed_up"] * 1
        elif prepare == "compiled":
            function = torch.compile(ops.moe_ffn, backend="aot_eager", fullgraph=True)
        elif prepare == "strided":
            inputs["routed_up"].grad = torch.ones_like(inputs["routed_up"].mT).mT
        with ops.accumulate_in_place():
            function(**used).square().sum().backward(create_graph=prepare == "create_graph")
        ops.moe_ffn(**plain).square().sum().backward()
        torch.testing.assert_close(inputs["routed_up"].grad, plain["routed_up"].grad, msg=prepare)
    assert len(seen) == 2


def test_wrong_main_grads_are_refused():
    for wrong in (torch.zeros(4, 12, 7), torch.zeros(4, 12, 8, dtype=torch.float64), [0.0]):
        inputs = layer()
        inputs["routed_up"].main_grad = wrong
        with (
            ops.accumulate_in_place(),
            pytest.raises(ValueError, match=r"`main_grad` must be .*\[4, 12, 8\].*, got .*; "),
        ):
            backward(inputs, batches=1)
        backward(inputs, batches=1)  # it concerns nobody outside
