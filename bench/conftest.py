"""The timing harness of all suites: checks outputs first, then times one contender and records what the figure needs.

A suite calls `contest` once for each contender of a group; the ratios between them, from one run on one machine, are
the result. Nothing here asserts a time.
"""

import functools
import os
import platform
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers

import ummrm
from ummrm import _library


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device type to run on; ummrm needs kernels for it")
    parser.addoption("--threads", type=int, default=None, help="CPU threads; by default torch's own choice")


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


def _synchronised(function, device):
    if device.type != "cuda":
        return function

    @functools.wraps(function)
    def run():
        out = function()
        torch.cuda.synchronize()
        return out

    return run


def _assert_same(label, got, want, dtype):
    """Contenders round at different places: held to a few roundings of the largest value, not to each other's bits."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(got, want, strict=True):
        if not b.is_floating_point():
            assert torch.equal(a.to(b.dtype), b), f"{label}: indices differ"
            continue
        error, scale = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        assert error <= tolerance * scale, f"{label}: differs by {error:.3g} at values up to {scale:.3g}"


@pytest.fixture
def contest(benchmark, device):
    """contest(group, label, function, want, dtype, shape, bytes_moved, flops): compares `function()` with the tensors
    `want` (None for a contender that computes something else by design), then times it."""

    def run(group, label, function, want, dtype, shape, bytes_moved=0, flops=0, rounds=7):
        if want is not None:
            got = function()
            _assert_same(label, got if isinstance(got, (list, tuple)) else [got], want, dtype)
        benchmark.group = group
        benchmark.extra_info.update(
            label=label,
            dtype=str(dtype).removeprefix("torch."),
            shape=shape,
            bytes=bytes_moved,
            flops=flops,
            compared=want is not None,
        )
        benchmark.pedantic(_synchronised(function, device), rounds=rounds, warmup_rounds=2)

    return run


def _rate(function, amount, device, repeats=7):
    run = _synchronised(function, device)
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return amount / best


_SLOW = 0.1  # of the fp32 rate


@pytest.fixture
def fast_gemm(device):
    """fast_gemm(dtype) skips where the machine has no native GEMM of that dtype: only mm's fallback would be timed."""

    def require(dtype):
        rates = machine_rates(device)
        rate = rates[f"mm_flops_{dtype}".replace("torch.", "")]
        if rate < _SLOW * rates["mm_flops_float32"]:
            pytest.skip(f"torch.mm in {dtype} reaches {rate / 1e9:.1f} GFLOP/s here, less than a tenth of fp32's")

    return require


@functools.cache
def machine_rates(device):
    """What this machine reaches in this run: bytes copied a second (reads and writes) and mm FLOPs a second."""
    source = torch.randn(32 << 20, device=device)
    target = torch.empty_like(source)
    rates = {"copy_bytes": _rate(lambda: target.copy_(source), 2 * source.numel() * 4, device)}
    n = 512 if device.type == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        rates[f"mm_flops_{dtype}".replace("torch.", "")] = _rate(
            lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2 * n**3, device
        )
    return rates


def _commit():
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout
    return commit + ("+changes" if dirty.strip() else "")


def _cpu():
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def pytest_configure(config):
    config.ummrm_skipped = []
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        item.config.ummrm_skipped.append(f"{item.originalname} {item.callspec.id}: {reason}")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    device = torch.device(config.getoption("--device"))
    output_json["ummrm"] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "commit": _commit(),
        "versions": {
            "ummrm": ummrm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "build": _library.build_info(),
        "allocator": {
            name: os.environ.get(name, "default")
            for name in ("GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")
        },
        "rates": machine_rates(device),
        "skipped": config.ummrm_skipped,  # contenders that were not run, and why
    }
