"""Every Triton kernel compiles for every GPU family without one: nothing spills, shared memory fits, and products run
on the matrix units. The fast tier compiles each kernel once for each family, in bf16; the slow one every configuration
of the table, every element type, and sizes that divide nothing.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from ummrm.ops import backends

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
import triton_compile
from triton_compile import CASES, TARGETS

kernels = backends.load_triton()
from ummrm.ops.triton_kernels import configurations, launch  # noqa: E402

gemm = importlib.import_module("ummrm.ops.triton_kernels.expert_gemm")
moe = importlib.import_module("ummrm.ops.triton_kernels.moe_ffn")

PRODUCTS = ("_expert_gemm", "_wgrad", "_up_activation")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path):
    """Nothing is taken from, or left in, the user's cache."""
    import triton

    assert not launch.INTERPRETED
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def launches(arch, case, dtype, h=1024, i=2048):
    """What `case` launches on `arch`, each kernel with each set of constants once."""
    with launch.recording(launch.Target(arch, TARGETS[arch][2])) as recorded:
        CASES[case](kernels.KERNELS, dtype, h, i)
    unlike = {}
    for one in recorded if case != "moe_ffn" else filter(of_the_composition, recorded):
        kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in one.arguments)
        unlike.setdefault((one.kernel.__name__, kinds, tuple(one.options.items())), one)
    return list(unlike.values())


def of_the_composition(one):
    """Whether no operator of its own launches the like: the kernel is the composition's, or gathers rows."""
    arguments = dict(zip(one.kernel.arg_names, one.arguments, strict=False))
    indices = (arguments.get(name) for name in ("row_index", "grad_index"))
    return one.kernel.__name__ == "_gate_grad" or any(index is not None for index in indices)


def check(arch, dtype, one):
    report = triton_compile.compile_launch(one, arch)
    what = f"{one.kernel.__name__} in {dtype} for {arch}, {one.options}: {report}"
    assert report.spilled == 0, what
    assert report.shared <= TARGETS[arch][1], what
    if one.kernel.__name__ in PRODUCTS and dtype in SIXTEEN_BITS:
        assert report.matrix, what
    assert report.descriptors == one.options.get("TMA", False), what
    if "GROUPS" in one.options and one.kernel.__name__ in PRODUCTS and len(one.grid) == 1:
        check_walk(arch, one, report, what)
    return report


def check_walk(arch, one, report, what):
    """The launch has as many programs as the device holds at a time: no processor idles, and none waits for another,
    but for one more a processor on AMD, where how many registers a program takes is the compiler's choice."""
    each = one.grid[0] / TARGETS[arch][2]
    width = 64 if arch.startswith("gfx") else 32
    registers, shared = configurations.RESOURCES[arch if arch in configurations.RESOURCES else "gfx9"]
    fit = min(registers // (report.registers * one.options["num_warps"] * width), shared // max(report.shared, 1))
    assert 1 <= each <= fit + arch.startswith("gfx"), f"{each} programs a processor where {fit} fit: {what}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel(arch, case):
    once = {}
    for one in launches(arch, case, torch.bfloat16):
        if case != "moe_ffn" or one.kernel.__name__ in ("_up_activation", "_wgrad", "_gate_grad"):
            once.setdefault((one.kernel.__name__, one.options.get("TRANSPOSE")), one)
    for one in once.values():
        check(arch, torch.bfloat16, one)


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1024, 2048), (1001, 2047)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_type_and_size(arch, case, dtype, sizes):
    for one in launches(arch, case, dtype, *sizes):
        check(arch, dtype, one)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_sizes_of_one(case):
    """One token, one shared expert: Triton makes a constant of every integer argument that is 1."""
    for one in launches("sm_90", case, torch.bfloat16):
        arguments = tuple(1 if isinstance(value, int) else value for value in one.arguments)
        triton_compile.compile_launch(replace(one, arguments=arguments), "sm_90")


def configured(monkeypatch, arch, dtype, configuration):
    monkeypatch.setattr(gemm, "choose", lambda *arguments: configuration)
    return [one for one in launches(arch, "expert_gemm", dtype) if one.kernel.__name__ in PRODUCTS]


def short(c):
    return f"{c.block_m}x{c.block_n}x{c.block_k}-{c.warps}-{c.stages}{'-tma' * c.tma}"


FUSED_TABLE = [
    pytest.param(
        arch, kind, activation, c, id=f"{arch}-{kind}-{activation}-{c.block_m}x{c.block_n}-{c.warps}{'-tma' * c.tma}"
    )
    for arch in TARGETS
    for kind, activation in (
        ("up_gated", "silu"),
        ("up_gated", "gelu_tanh"),
        ("up_gated", "relu2"),
        ("up_gated_gelu", "gelu"),
        ("up_plain", "silu"),
        ("up_plain_gelu", "gelu"),
    )
    for c in configurations.with_tma(arch, configurations.fused_candidates(kind, arch, torch.bfloat16))
]


def fused(monkeypatch, arch, kind, activation, configuration):
    monkeypatch.setattr(moe, "choose_fused", lambda *arguments: configuration)
    monkeypatch.setattr(triton_compile, "ACTIVATIONS", [(activation, "gated" in kind)])
    (one,) = (one for one in launches(arch, "moe_ffn", torch.bfloat16) if one.kernel.__name__ == "_up_activation")
    return check(arch, torch.bfloat16, one)


@pytest.mark.full
@pytest.mark.parametrize(("arch", "kind", "activation", "configuration"), FUSED_TABLE)
def test_every_fused_configuration(monkeypatch, arch, kind, activation, configuration):
    fused(monkeypatch, arch, kind, activation, configuration)


def with_descriptors(arch, dtype):
    table = configurations.candidates(arch, dtype)
    return configurations.with_tma(arch, table) if dtype in SIXTEEN_BITS else table


TABLE = [
    pytest.param(
        arch, dtype, c, id=f"{arch}-{dtype}-{c.block_m}x{c.block_n}x{c.block_k}-{c.warps}-{c.stages}{'-tma' * c.tma}"
    )
    for arch in TARGETS
    for dtype in (torch.bfloat16, torch.float32, torch.float64)
    for c in with_descriptors(arch, dtype)
]


@pytest.mark.full
@pytest.mark.parametrize(("arch", "dtype", "configuration"), TABLE)
def test_every_configuration(monkeypatch, arch, dtype, configuration):
    for one in configured(monkeypatch, arch, dtype, configuration):
        check(arch, dtype, one)


# sm_86, sm_89 and sm_120 have 99 KB; they run what sm_80's instructions give.
SMALL_SHARED = 101376


@pytest.mark.full
@pytest.mark.parametrize("configuration", configurations.candidates("sm_86", torch.bfloat16), ids=short)
def test_configurations_of_small_shared_memory(monkeypatch, configuration):
    for one in configured(monkeypatch, "sm_80", torch.bfloat16, configuration):
        assert check("sm_80", torch.bfloat16, one).shared <= SMALL_SHARED


@pytest.mark.full
@pytest.mark.parametrize(("kind", "activation"), [("up_gated_gelu", "gelu"), ("up_plain_gelu", "gelu")])
def test_fused_configurations_of_small_shared_memory(monkeypatch, kind, activation):
    for configuration in configurations.fused_candidates(kind, "sm_86", torch.bfloat16):
        assert fused(monkeypatch, "sm_80", kind, activation, configuration).shared <= SMALL_SHARED


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_projections_through_descriptors(monkeypatch, arch):
    (configuration,) = (replace(c, tma=True) for c in configurations.candidates(arch, torch.bfloat16)[:1])
    for one in configured(monkeypatch, arch, torch.bfloat16, configuration)[:2]:
        assert check(arch, torch.bfloat16, one).descriptors


def test_a_spill_is_found(monkeypatch):
    """What the table leaves out for that reason."""
    configuration = configurations.Configuration(256, 256, 32, 4, 3)
    one = configured(monkeypatch, "sm_80", torch.bfloat16, configuration)[0]
    assert triton_compile.compile_launch(one, "sm_80").spilled > 0


def test_exact_products_are_not_on_nvidias_tensor_cores(monkeypatch):
    """fp32 is fp32 unless torch is asked for less."""
    (one, *_) = configured(monkeypatch, "sm_80", torch.float32, configurations.candidates("sm_80", torch.float32)[-1])
    assert one.options["PRECISION"] == "ieee" and not triton_compile.compile_launch(one, "sm_80").matrix


def asked_by_its_new_name():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("ask", [lambda: torch.set_float32_matmul_precision("high"), asked_by_its_new_name])
def test_less_than_exact_products_are_asked_for_in_either_way_of_torchs(ask):
    ask()
    try:
        for dtype, precision in ((torch.float32, "tf32"), (torch.bfloat16, "ieee")):
            assert launches("sm_80", "expert_gemm", dtype)[0].options["PRECISION"] == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
