"""The Triton backend on a machine without a GPU: its kernels through Triton's interpreter, in a process of their own:
it is chosen before Triton is imported; and how the backend is chosen, refused and packaged.

The fast tier takes a parameter set of each test function and dtype, the slow one all. The grid runs serially there:
races between programs, and speed, are not shown.
"""

import importlib.util
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from checkout import ROOT

import ummrm
from ummrm.ops import backends

OPERATORS = ("routing", "permute", "expert_gemm", "activation", "merge_experts", "moe_ffn", "merged_ffn", "grouped")
HUGE = (  # 2^31 elements take hours to interpret; strides beyond that are tested there too
    "tests/ops/test_permute.py::test_beyond_two_to_the_31_elements",
    "tests/ops/test_activation.py::test_beyond_two_to_the_31_elements",
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; its wheels are for Linux alone"
)


def interpreted(*arguments):
    """pytest with `arguments` where Triton interprets and serves every operator."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "pytest", "-q", "--backend=triton"]
    command += ["-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
def test_interpreted(request):
    """A gradcheck is hundreds of calls, and the serial grid is deterministic by itself: the slow tier has them, and the
    operators that a whole training run here goes through."""
    seed = f"--seed={request.config.ummrm_seed}"
    fast = ["--at-most=1", "-k", "not gradcheck and not deterministic"]
    chosen = [f"tests/ops/test_{name}.py" for name in ("routing", "permute", "expert_gemm")]
    out = interpreted(
        "tests/support/triton_interpreted.py", *chosen, *(f"--deselect={name}" for name in HUGE), *fast, seed
    )
    assert " passed" in out and "failed" not in out


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("name", [*OPERATORS, "library"])
def test_interpreted_in_full(request, name):
    deselected = [f"--deselect={huge}" for huge in HUGE]
    interpreted(f"tests/ops/test_{name}.py", *deselected, f"--seed={request.config.ummrm_seed}")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: Triton can run here")
def test_without_a_gpu_it_is_refused_with_a_remedy():
    with pytest.raises(RuntimeError, match="'triton' cannot run here: there is no GPU; .*TRITON_INTERPRET=1"):
        ummrm.use_backend("triton")
    assert backends.backend_for("cpu") == "compiled"


@needs_triton
def test_it_serves_cuda_where_the_extension_does_not():
    """By default, on the dispatch key, without importing Triton: that takes place when a kernel runs first."""
    program = """
import sys, torch, ummrm
from ummrm.ops import backends
for op in backends.BACKENDS["triton"].kernels:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ummrm::{op}", "CUDA"), op
print("ummrm.ops.triton_kernels" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]


def test_without_triton_nothing_else_breaks():
    """A machine without it, as the import system sees one: CUDA's refusal says what to install."""
    program = """
import sys
sys.modules["triton"] = None
import torch, ummrm
from ummrm.ops import backends
print(ummrm.ops.activation(torch.ones(1, 2), "relu").item())
kernel = backends.BACKENDS["triton"].kernels["activation"]
for call in (lambda: ummrm.use_backend("triton"), lambda: kernel(torch.ones(1, 2), "relu", True)):
    try:
        call()
    except (RuntimeError, ImportError) as error:
        print(type(error).__name__, error)
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.ummrm.activation.default.redispatch(key, torch.ones(2, 4), "silu", True)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    value, refused, missing, cuda = done.stdout.strip().splitlines()
    assert float(value) == 1
    assert refused == (
        "RuntimeError Backend 'triton' cannot run here: Triton is not installed; on Linux: pip install 'ummrm[triton]'."
    )
    assert missing.startswith("ModuleNotFoundError")
    if torch.version.cuda is None:
        assert "got 'cuda'" in cuda and "ummrm[triton]" in cuda


@needs_triton
def test_one_entry_for_each_operator_of_the_table():
    kernels = backends.load_triton()
    composed = {"moe_ffn", "moe_ffn_forward", "moe_ffn_backward", "moe_ffn_backward_add"}
    assert set(kernels.KERNELS) == set(backends.BACKENDS["triton"].kernels)
    assert set(kernels.KERNELS) == set(backends.BACKENDS["reference"].kernels) | composed
    assert kernels.__name__ == "ummrm.ops.triton_kernels" and sys.modules[kernels.__name__] is kernels


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_first_configuration_that_fits_is_the_largest(arch, dtype):
    backends.load_triton()
    from ummrm.ops.triton_kernels import configurations

    sizes = [c.block_m * c.block_n for c in configurations.candidates(arch, dtype)]
    assert sizes == sorted(sizes, reverse=True)


@needs_triton
def test_configurations_depend_on_shapes_alone_and_come_from_a_file(tmp_path):
    backends.load_triton()
    from ummrm.ops.triton_kernels import configurations
    from ummrm.ops.triton_kernels.launch import Target

    few, many = Target("sm_90", 1), Target("sm_90", 132)
    shape = torch.bfloat16, 4096, 0, 4096, 1024
    chosen = configurations.choose("rows", many, *shape)
    assert chosen == configurations.choose("rows", few, *shape) in configurations.candidates("sm_90", torch.bfloat16)
    assert configurations.choose("rows", many, torch.bfloat16, 8, 0, 4096, 1024).block_m == 16
    assert configurations.choose("rows", many, torch.bfloat16, 32, 0, 4096, 1024).block_m == 32
    assert configurations.choose("rows", many, torch.bfloat16, 4096, 0, 64, 1024).block_m == 64
    path = tmp_path / "tuned.json"
    assert configurations.read_tuned(path) == {}
    table = {configurations.key("rows", "sm_90", *shape): chosen}
    configurations.write_tuned(table, path)
    assert configurations.read_tuned(path) == table


@needs_triton
def test_what_is_fused_depends_on_shapes_alone(monkeypatch):
    backends.load_triton()
    from ummrm.ops.triton_kernels import configurations
    from ummrm.ops.triton_kernels.launch import Target

    h200, bf16 = Target("sm_90", 132), torch.bfloat16
    chosen = configurations.choose_fused("up_gated", h200, bf16, 4096, 14336, 4096)
    assert chosen == configurations.fused_candidates("up_gated", "sm_90", bf16)[0]
    assert chosen == configurations.choose_fused("up_gated", Target("sm_90", 1), bf16, 4096, 14336, 4096)
    assert configurations.choose_fused("up_gated", h200, bf16, 4096, 14335, 4096) is None
    assert configurations.choose_fused("up_gated", h200, bf16, 4096, 14336, 4090) is None
    assert configurations.choose_fused("up_gated", h200, torch.float32, 4096, 14336, 4096) is None
    slower = configurations.key("up_gated", "sm_90", bf16, 4096, 0, 14336, 4096)
    monkeypatch.setattr(configurations, "_tuned", {slower: None})
    assert configurations.choose_fused("up_gated", h200, bf16, 4096, 14336, 4096) is None
    assert configurations.choose_fused("up_gated", h200, bf16, 8192, 14336, 4096) is not None


@needs_triton
@pytest.mark.parametrize("kind", ["up_gated", "up_gated_gelu", "up_plain", "up_plain_gelu"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_programs_fill_a_processor(arch, kind):
    """A small tile takes little of it, and few rows would leave the rest idle."""
    backends.load_triton()
    from ummrm.ops.triton_kernels import configurations
    from ummrm.ops.triton_kernels.launch import Target

    *_, small = configurations.fused_candidates(kind, arch, torch.bfloat16)
    assert small.block_m == 16 and configurations.programs(arch, torch.bfloat16, small) > 1
    for dtype in (torch.bfloat16, torch.float32, torch.float64):  # sizes that divide nothing have tiles of their own
        odd = configurations.choose("rows", Target(arch, 100), dtype, 4096, 0, 2047, 1001)
        assert configurations.programs(arch, dtype, odd) >= 1


@needs_triton
def test_tuning_leaves_out_what_does_not_run_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    backends.load_triton()
    from bench import tune_triton
    from ummrm.ops.triton_kernels import configurations
    from ummrm.ops.triton_kernels.launch import Target

    listed = configurations.fused_candidates("up_gated", "sm_90", torch.bfloat16)
    best = replace(listed[2], tma=True)
    took = {listed[0]: 3.0, best: 1.0, None: 2.0}  # milliseconds; the others do not launch
    chooser = types.SimpleNamespace(choose_fused=configurations.choose_fused)
    asked = []

    def call():
        asked.append(chooser.choose_fused("up_gated", Target("sm_90", 132), torch.bfloat16, 4096, 2048, 1024))
        if asked[-1] not in took:
            raise RuntimeError("out of resource: shared memory")

    def milliseconds(function):
        function()
        return took[asked[-1]]

    monkeypatch.setattr(tune_triton, "milliseconds", milliseconds)
    product = tune_triton.Product("up", call, chooser, "choose_fused", True)
    key, fastest, times = tune_triton.tune(product, configurations)
    assert (fastest, times) == (best, took) and chooser.choose_fused is configurations.choose_fused
    assert key == configurations.key("up_gated", "sm_90", torch.bfloat16, 4096, 0, 2048, 1024)
    assert f"{listed[1]} is left out: RuntimeError: out of resource" in capsys.readouterr().out

    path = tmp_path / "tuned.json"
    configurations.write_tuned({key: best, "another": None}, path)
    with pytest.raises(TypeError):
        configurations.write_tuned({key: 1}, path)
    assert configurations.read_tuned(path) == {key: best, "another": None} and list(tmp_path.iterdir()) == [path]
