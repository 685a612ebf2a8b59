"""What torch is told about the operators: transforms, double backward, autocast, backends, and the import check."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from op_inputs import expert_indices, floats, gate_weights, moe_inputs
from test_merged_ffn import merged_inputs, without_x
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ummrm
from ummrm import ops
from ummrm.ops import backends, library

raw = torch.ops.ummrm
T, H, INTERMEDIATE, E, K, S = 5, 4, 3, 3, 2, 2


def moe_arguments(dtype=torch.float64):
    return moe_inputs(T, H, INTERMEDIATE, E, K, S, kind="some_dead", dtype=dtype)


def cases():
    """name: (function of one differentiable tensor, that tensor); one for each differentiable operator."""
    indices = expert_indices(T, E, K, "some_dead")
    slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(indices, E)
    shared, routed = gate_weights(indices, torch.float64)
    make = {"dtype": torch.float64}
    proj, rows = (floats(S, 3, H, **make), floats(E, 3, H, **make)), floats(T * K, H, **make)
    moe = {n: v.detach() for n, v in moe_arguments().items()}
    merged = merged_inputs(T, H, INTERMEDIATE, E, S, dtype=torch.float64, requires_grad=False)
    merge = without_x(merged)
    experts = [floats(S, 3, **make)], [floats(E, 3, **make)]
    return {
        "route": (lambda x: ops.route(x, top_k=K).routed_weights, floats(T, E, **make)),
        "permute": (lambda x: ops.permute(x, sorted_to_slot, offsets, K), floats(T, H, **make)),
        "unpermute": (
            lambda x: ops.unpermute(x, slot_to_sorted, offsets, shared, routed, S, K),
            floats(S * T + T * K, H, **make),
        ),
        "expert_gemm": (lambda x: ops.expert_gemm(x, rows, *proj, offsets, T), floats(T, H, **make)),
        "activation": (lambda x: ops.activation(x), floats(T, 6, **make)),
        "merge_experts": (lambda x: ops.merge_experts(*experts, x)[0], torch.rand(1, S + E, **make)),
        "moe_ffn": (lambda x: ops.moe_ffn(**moe | {"x": x}), moe["x"]),
        "merge_ffn": (lambda x: ops.merge_ffn(**merge | {"coefficients": x})[0], merge["coefficients"]),
        "merged_ffn": (lambda x: ops.merged_ffn(**merged | {"coefficients": x}), merged["coefficients"]),
    }


NAMES = (
    "route",
    "permute",
    "unpermute",
    "expert_gemm",
    "activation",
    "merge_experts",
    "moe_ffn",
    "merge_ffn",
    "merged_ffn",
)


@pytest.fixture(params=NAMES)
def case(request):
    return *cases()[request.param], request.param


def test_every_differentiable_operator_is_here():
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("ummrm::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"):
            assert name.removeprefix("ummrm::") in NAMES
    assert set(NAMES) == set(cases())


def test_func_grad(case):
    function, x, _ = case
    weights = torch.randn_like(function(x))
    want = torch.autograd.grad((function(x.requires_grad_()) * weights).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: (function(x) * weights).sum())(x.detach()), want)


def test_jvp_and_forward_mode(case):
    """Against backward: <w, J v> is <J^T w, v>."""
    function, x, _ = case
    tangent, weights = torch.randn_like(x), torch.randn_like(function(x))
    want = (torch.autograd.grad((function(x.requires_grad_()) * weights).sum(), x)[0] * tangent).sum()
    out, derivative = torch.func.jvp(function, (x.detach(),), (tangent,))
    torch.testing.assert_close((derivative * weights).sum(), want)
    torch.testing.assert_close(out, function(x.detach()))
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x.detach(), tangent))
        torch.testing.assert_close((forward_ad.unpack_dual(dual).tangent * weights).sum(), want)


def test_vmap(case):
    function, x, _ = case
    batch = torch.stack([x, x + 0.1, x * 2])
    want = torch.stack([function(row) for row in batch])
    torch.testing.assert_close(torch.func.vmap(function)(batch), want)
    grads = torch.func.vmap(torch.func.grad(lambda x: function(x).square().sum()))(batch)
    torch.testing.assert_close(grads[1], torch.func.grad(lambda x: function(x).square().sum())(batch[1]))


def test_second_derivatives_through_func(case):
    """torch.func runs plain torch, which can be differentiated again: here against finite differences."""
    function, x, _ = case
    gradient = torch.func.grad(lambda x: function(x).square().sum())
    tangent, h = torch.randn_like(x), 1e-6
    derivative = torch.func.jvp(gradient, (x,), (tangent,))[1]
    numeric = (gradient(x + h * tangent) - gradient(x - h * tangent)) / (2 * h)
    torch.testing.assert_close(derivative, numeric, rtol=1e-5, atol=1e-5 * max(1, float(numeric.abs().max())))


def test_vmap_over_sorting():
    batch = torch.stack([expert_indices(6, 4, 2, "some_dead") for _ in range(3)])
    for a, b in zip(torch.func.vmap(lambda i: ops.sort_slots(i, 4))(batch), zip(*(ops.sort_slots(i, 4) for i in batch),
                    strict=True), strict=True):  # fmt: skip
        assert torch.equal(a, torch.stack(b))


class SeenTypes(TorchDispatchMode):
    """Records the dtypes of floating tensors that each of our operators receives below autocast and autograd."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ummrm":
            names = (argument.name for argument in function._schema.arguments)
            self.seen[function._schema.name.removeprefix("ummrm::")] = {
                name: value.dtype for name, value in zip(names, args, strict=False) if isinstance(value, torch.Tensor)
            }
        return function(*args, **(kwargs or {}))


PARAMETERS = tuple(f"{kind}_{name}" for kind in ("shared", "routed") for name in ("up", "down", "up_bias", "down_bias"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_moe_ffn_in_the_low_dtype(dtype):
    """fp32 weights under autocast: the kernels see 16 bits, gate weights stay fp32, gradients arrive in fp32."""
    arguments = moe_arguments(torch.float32)
    with torch.autocast("cpu", dtype), SeenTypes() as mode:
        out = ops.moe_ffn(**arguments)
    seen = mode.seen["moe_ffn_forward"]
    assert all(seen[name] == dtype for name in ("x", *PARAMETERS))
    assert seen["shared_weight"] == seen["routed_weights"] == torch.float32
    assert out.dtype == dtype
    leaves = [v for v in arguments.values() if v.requires_grad]
    with SeenTypes() as mode:
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(mode.seen["moe_ffn_backward"][name] == dtype for name in ("grad_out", "x", *PARAMETERS))
    assert all(g.dtype == torch.float32 for g in grads)
    low = {n: v.detach().to(dtype) if n == "x" or n in PARAMETERS else v for n, v in arguments.items()}
    assert torch.equal(ops.moe_ffn(**low), out)


def test_autocast_of_the_other_operators():
    """expert_gemm is cast like moe_ffn; merged_ffn casts x only; route computes in fp32; the rest is left alone."""
    half = torch.bfloat16
    with torch.autocast("cpu", half), SeenTypes() as mode:
        offsets = ops.sort_slots(expert_indices(T, E, K), E)[2]
        proj = floats(S, 3, H, requires_grad=True), floats(E, 3, H)
        out = ops.expert_gemm(floats(T, H), floats(T * K, H), *proj, offsets, T, floats(S, 3), floats(E, 3))
        assert out.dtype == half
        assert all(t == half for n, t in mode.seen["expert_gemm"].items() if n != "expert_offsets")
        assert torch.autograd.grad(out.sum(), proj[0])[0].dtype == torch.float32

        merged = merged_inputs(T, H, INTERMEDIATE, E, S)
        assert ops.merged_ffn(**merged).dtype == half
        seen = mode.seen["merged_ffn_forward"]
        assert seen["x"] == half and all(seen[n] == torch.float32 for n in (*PARAMETERS, "coefficients"))

        logits = floats(T, E, dtype=half, requires_grad=True)
        routing = ops.route(logits, top_k=K)
        assert mode.seen["route"]["logits"] == torch.float32 and routing.mean_prob.dtype == torch.float32
        assert torch.autograd.grad(routing.mean_z, logits)[0].dtype == half
        assert ops.activation(floats(2, 4)).dtype == torch.float32
        assert ops.merge_experts([floats(1, 3)], [floats(2, 3)], torch.rand(1, 3))[0].dtype == torch.float32


def test_backward_inside_autocast_is_the_same():
    """backward() called while autocast is on neither casts nor fails."""
    for op, arguments in (
        (ops.moe_ffn, moe_arguments(torch.float32)),
        (ops.merged_ffn, merged_inputs(T, H, INTERMEDIATE, E, S)),
    ):
        leaves = [v for v in arguments.values() if v.requires_grad]
        want = torch.autograd.grad(op(**arguments).sum(), leaves)
        out = op(**arguments).sum()
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(out, leaves)
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)


def profiled(function):
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}


def test_use_backend_switches_and_switches_back():
    z, arguments = floats(3, 4), moe_arguments(torch.float32)
    assert backends.backend_for("cpu") == "compiled"
    for name in ("reference", "compiled", "reference", "reference", "compiled"):
        ummrm.use_backend(name)
        plain = name == "reference"
        assert backends.backend_for("cpu") == name
        assert ("aten::silu" in profiled(lambda: ops.activation(z))) == plain
        assert ("aten::silu" in profiled(lambda: ops.moe_ffn(**arguments))) == plain  # composed operators follow
    ummrm.use_backend("reference")
    try:
        with pytest.raises(IndexError, match=r"`expert_indices` must lie in \[-1, 2\].*got"):
            ops.sort_slots(torch.full((2, 2), 3, dtype=torch.int32), 3)
    finally:
        ummrm.use_backend("compiled")


def test_a_backend_that_cannot_run_raises_and_changes_nothing(monkeypatch):
    row = backends.Backend(
        ("cpu",), backends.BACKENDS["reference"].kernels, lambda: "it needs a device that is not here"
    )
    monkeypatch.setitem(backends.BACKENDS, "absent", row)
    with pytest.raises(RuntimeError, match="'absent' cannot run here: it needs a device that is not here"):
        ummrm.use_backend("absent")
    assert backends.backend_for("cpu") == "compiled"
    with pytest.raises(
        ValueError, match="`name` must be one of 'compiled', 'reference', 'triton', 'absent', got 'gpu'"
    ):
        ummrm.use_backend("gpu")
    with pytest.raises(ValueError, match="`device` must be of a type that a backend serves, got 'meta'"):
        backends.backend_for("meta")


@pytest.mark.parametrize(
    ("capabilities", "asked", "obstacle", "serves"),
    [
        ([(10, 0)], None, None, "triton"),
        ([(10, 0), (10, 3)], None, None, "triton"),
        ([(9, 0)], None, None, "compiled"),
        ([(12, 0)], None, None, "compiled"),
        ([(10, 0), (9, 0)], None, None, "compiled"),
        ([(10, 0)], "compiled", None, "compiled"),
        ([(10, 0)], None, "Triton is not installed", "compiled"),
        ([], None, None, "compiled"),
    ],
)
def test_triton_serves_gpus_whose_tensor_cores_it_uses_better(monkeypatch, capabilities, asked, obstacle, serves):
    """The choice alone, as it is made when CUDA starts, in a build that has CUDA kernels."""
    compiled, triton = backends.BACKENDS["compiled"], backends.BACKENDS["triton"]
    monkeypatch.setitem(backends.BACKENDS, "compiled", dataclasses.replace(compiled, devices=("cpu", "cuda")))
    monkeypatch.setitem(
        backends.BACKENDS, "triton", dataclasses.replace(triton, obstacle=lambda: obstacle, interprets=lambda: False)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(backends, "_asked", False)
    try:
        if asked:
            ummrm.use_backend(asked)
        backends._choose_by_gpu()
        assert backends.backend_for("cuda") == serves and backends.backend_for("cpu") == "compiled"
    finally:
        ummrm.use_backend("compiled")


def test_the_choice_by_gpu_is_made_when_cuda_starts():
    """By a private name of torch's; without it Triton has to be asked for there."""
    assert torch.cuda.is_initialized() or backends._choose_by_gpu in [call for call, _ in torch.cuda._queued_calls]


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_without_kernels_is_one_clear_error(device):
    """By the kernel on that device's key, since no such device is here. A build for CUDA has kernels on its key."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
    with pytest.raises(ValueError, match=f"ummrm.activation: `device` must .*got '{device}'; move"):
        raw.activation.default.redispatch(key, floats(2, 4), "silu", True)


def test_no_operator_mutates_or_aliases():
    """By schema, for torch.compile to rely on; opcheck proves it on values. Those that add to sums say so."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("ummrm::")]
    assert len(names) == 25
    for name in names:
        schema = getattr(raw, name.removeprefix("ummrm::")).default._schema
        aliased = [a.name for a in [*schema.arguments, *schema.returns] if a.alias_info is not None]
        assert aliased == [a.name for a in schema.arguments if name.endswith("_add") and a.name.endswith("_sum")]
        assert schema.is_mutable == bool(aliased)
        assert torch.Tag.pt2_compliant_tag in getattr(raw, name.removeprefix("ummrm::")).default.tags


def test_build_record_is_checked_before_loading(tmp_path):
    with pytest.raises(ImportError, match=r"`ummrm._C` is missing in .*; build it: pip install"):
        library.check_build(tmp_path, "2.13.0")
    (tmp_path / "_build_record.json").write_text(json.dumps({"torch_version": "2.13.0+cpu"}))
    library.check_build(tmp_path, "2.13.1+cu130")
    for running in ("2.12.1", "2.14.0", "3.13.0", "2.1.0"):
        message = rf"was built against torch 2\.13\.0\+cpu .* torch {re.escape(running)} is installed.*pip install"
        with pytest.raises(ImportError, match=message):
            library.check_build(tmp_path, running)


def test_importing_against_another_torch_is_one_error():
    """In a process of its own: the error comes before the library is loaded, and is an ImportError with the remedy."""
    program = """
import sys, torch
torch.__version__ = "9.9.0"
try:
    import ummrm
except ImportError as error:
    print(error)
print("ummrm._C" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    message, loaded = out.stdout.strip().splitlines()
    assert "was built against torch" in message and "torch 9.9.0 is installed" in message and loaded == "False"


def test_build_info():
    info = library.build_info()
    assert info["torch_version"].split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    assert {"cpp_standard", "cuda_archs", "cpu_isa", "fp32_gemm", "compiler"} <= set(info)
    assert isinstance(library.tile_table(), list)
    ummrm.check(True)
    ummrm.check(False)
