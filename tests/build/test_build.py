"""The build itself: what the extension says of itself, whose thread pool it runs on, that its results do not depend on
the number of threads, and (slow tier) that it builds from a clean copy, isolated and not."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from checkout import ROOT

import ummrm
from ummrm.ops import library

PACKAGE = Path(ummrm.__file__).parent
# Of a repository alone, and records of past runs on other machines
NOT_IN_THE_ARCHIVE = (".", "bench/results/")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_build_info():
    info = library.build_info()
    assert info["torch_version"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cpp_standard"] >= 202002
    assert info["cpu_isa"] in ("x86-64-v4", "x86-64-v3", "baseline")
    assert info["compiler"].startswith(("gcc", "clang"))
    assert info["fp32_gemm"].startswith(("at::mm", "oneDNN"))
    has_cuda = library.no_cuda_kernels is None
    assert bool(info["cuda_archs"]) == has_cuda == (info["nvcc"] is not None) == bool(library.tile_table())


def test_record_lies_beside_the_extension():
    record = json.loads((PACKAGE / "_build_record.json").read_text())
    assert record["torch_version"] == torch.__version__
    assert record["cxx_standard"] == "c++20"
    if ROOT in PACKAGE.parents:  # an editable install: the folders are the source list
        listed = {p.relative_to(ROOT).as_posix() for d in ("csrc", "kernels/cpu") for p in (ROOT / d).glob("*.cpp")}
        assert set(record["sources"]) == listed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps, which Linux alone has")
def test_one_openmp_runtime():
    """Two OpenMP runtimes in a process are two thread pools, one of which torch.set_num_threads does not reach."""
    show = "import ummrm; print(open('/proc/self/maps').read())"
    maps = run(sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", show)
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/task, which Linux alone has")
@pytest.mark.parametrize("threads", [1, 3])
def test_set_num_threads_reaches_the_kernels(threads):
    """A kernel that runs first starts the pool, one thread less than set; torch's own operators then start no other."""
    program = (
        "import os, sys, torch, ummrm\n"
        "tasks = lambda: len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(int(sys.argv[1])); z = torch.empty(4096, 512); before = tasks()\n"
        "torch.ops.ummrm.activation(z, 'silu', True); ours = tasks()\n"
        "torch.sigmoid(z); print(ours - before, tasks() - ours)"
    )
    assert run(sys.executable, "-c", program, threads, cwd="/").split() == [str(threads - 1), "0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_whatever_the_number_of_threads(dtype):
    torch.manual_seed(0)
    tokens, experts, top_k, width = 3000, 6, 3, 700
    logits, z = torch.randn(tokens, experts, dtype=dtype), torch.randn(tokens, 2 * width, dtype=dtype)
    grad, weights = torch.randn(tokens, width, dtype=dtype), torch.rand(tokens)
    shared, routed = torch.randn(1, 300, 300, dtype=dtype), torch.randn(experts, 300, 300, dtype=dtype)
    merged_grad = torch.randn(300, 300, dtype=dtype)
    ops = torch.ops.ummrm

    def everything():
        routing = ops.route(logits, None, None, top_k, "shared_complement", 0.5)
        slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(routing[2], experts)
        rows = ops.permute(grad, sorted_to_slot, offsets, top_k)
        return [
            *routing,
            rows,
            ops.unpermute(rows, slot_to_sorted, offsets, None, routing[1], 0, top_k),
            *ops.activation_backward(grad, z, weights, "gelu", True),
            *ops.expert_bias_grad(grad[:0], rows, None, offsets, 0, 0, False, True),
            ops.merge_experts_dots([merged_grad], [shared], [routed]),
        ]

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
@pytest.mark.parametrize("bias", [None, "dense", "strided"])
def test_onednn_product(form, bias):
    """The fp32 product that csrc/gemm.cpp takes on some processors, in each form that expert_gemm asks for. oneDNN
    reads the bias as if it were dense: a row of a matrix stored by columns is not.
    """
    torch.manual_seed(0)
    a, b = torch.randn(37, 24), torch.randn(24, 41)
    a = a.t().contiguous().t() if form[0] == "t" else a
    b = b.t().contiguous().t() if form[1] == "t" else b
    offset = {None: None, "dense": torch.randn(41), "strided": torch.randn(41, 3)[:, 1]}[bias]
    want = a.double() @ b.double() + (0 if bias is None else offset.double())
    got = library.onednn_product(a, b, offset)
    assert (got - want).abs().max() < 1e-5


PRODUCTS = {"forward": lambda a, b: a @ b.T, "input_grad": lambda a, b: a @ b, "weight_grad": lambda a, b: b.T @ a}


@pytest.mark.skipif(library.build_info()["cpu_isa"] == "baseline", reason="no fp32 products for this processor")
@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("rows", [0, 1, 37, 203], ids=str)
def test_host_product(kind, rows):
    """The fp32 products that moe_ffn makes on a CPU, alone; also of views that are stored by columns."""
    torch.manual_seed(0)
    a, b = torch.randn(24, rows).t(), torch.randn(rows, 41)  # rows and their gradient
    if kind != "weight_grad":
        b = torch.randn(24, 41).t() if kind == "forward" else torch.randn(24, 41)
    got, want = library.host_product(a, b, kind), PRODUCTS[kind](a.double(), b.double())
    assert got.shape == want.shape and torch.allclose(got.double(), want, rtol=0, atol=2e-5)


def test_host_product_refuses_what_it_cannot_multiply():
    a = torch.randn(4, 5)
    for wrong, message in (
        ((a, a, "backward"), "`kind` must be 'forward', 'input_grad' or 'weight_grad', got 'backward'"),
        ((a, a.double(), "forward"), "must be 2-D tensors of float32 on a CPU"),
        ((a, a[0], "forward"), "must be 2-D tensors"),
        ((a, a, "input_grad"), r"one size in common to sum over, got \[4, 5\] and \[4, 5\] for 'input_grad'"),
        ((a, a[:3], "weight_grad"), "one size in common"),
        ((a, a[:, :4], "forward"), "one size in common"),
    ):
        with pytest.raises(ValueError, match=message):
            library.host_product(*wrong)


def copy_of_sources(folder):
    files = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.full
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
def test_wheel_from_clean_sources(tmp_path, isolated):
    """Built against this interpreter's torch, never against one that pip brings; the wheel carries what it needs."""
    source, wheels, target = copy_of_sources(tmp_path / "source"), tmp_path / "wheels", tmp_path / "installed"
    options = [] if isolated else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "-w", wheels, source)
    (wheel,) = wheels.glob("ummrm-*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel)
    assert {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")} <= {"ummrm", "bin"}
    assert (target / "ummrm/ops/triton_kernels/routing.py").is_file()
    assert json.loads((target / "ummrm/_build_record.json").read_text())["torch_version"] == torch.__version__
    program = (
        "import ummrm, torch; print(ummrm.__file__); "
        "print(torch.ops.ummrm.activation(torch.ones(1, 2), 'relu', True).item())"
    )
    where, value = run(
        sys.executable, "-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}
    ).split()
    assert Path(where).parent == target / "ummrm" and float(value) == 1


def test_the_source_archive_holds_the_checkout_and_the_package_does_not(tmp_path):
    """Whoever has the archive can test and study; whoever installs gets `ummrm` alone."""
    build = "import sys; sys.path.insert(0, 'tools'); import build_backend; build_backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=copy_of_sources(tmp_path / "source"))
    (archive,) = tmp_path.glob("ummrm-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = {p.relative_to(tmp_path / "source").as_posix() for p in (tmp_path / "source").rglob("*") if p.is_file()}
    left_out = {name for name in tracked - held if not name.startswith(NOT_IN_THE_ARCHIVE)}
    assert left_out == set()
    assert [name for name in held if name.startswith(("build/", "out/", ".venv")) or name.endswith(".so")] == []
