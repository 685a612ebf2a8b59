"""The tests that need a GPU: `pytest tests/gpu`. `--device cpu` rehearses their bodies where there is none, and
`--backend triton` runs them on Triton's kernels instead of the extension's.

Without a CUDA device, or with an extension that has no CUDA kernels to test, the whole folder is skipped and says why;
whoever needs it to have run (bench/gpu_stages.py) counts what passed.
"""

import os
from pathlib import Path

import pytest
import torch

from ummrm.ops import library

HERE = Path(__file__).parent


def obstacle(config):
    """Why the tests cannot run on the device that was asked for, or None."""
    if torch.device(config.getoption("--device")).type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here; `--device cpu` rehearses these tests"
    if config.getoption("--backend") in (None, "compiled") and not library.build_info()["cuda_archs"]:
        return "the extension was built without CUDA kernels; `--backend triton` tests Triton's"
    return None


class Skipped(pytest.Module):
    """A file none of whose tests can run: one skip that says why, instead of one for each test."""

    def collect(self):
        pytest.skip(obstacle(self.config), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if obstacle(parent.config):
        return Skipped.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(config, items):
    on_cpu = torch.device(config.getoption("--device")).type == "cpu"
    compiled = config.getoption("--backend") in (None, "compiled")
    for item in (item for item in items if HERE in item.path.parents):
        if on_cpu and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="says nothing of a CPU"))
        if not compiled and item.get_closest_marker("compiled_only"):
            item.add_marker(pytest.mark.skip(reason="says nothing of another backend"))


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def machine(device):
    """fp32 products in fp32, whatever the machine's configuration says; the reference on all of its cores."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


@pytest.fixture
def poisoned(poisoned, device):
    """As elsewhere, and on CUDA the allocator's free blocks hold NaN as well, which workspaces are cut from."""
    if device.type == "cuda":
        blocks = [torch.full((2**size,), float("nan"), device=device) for size in (8, 8, 12, 14, 16, 16, 18, 22, 24)]
        del blocks
        assert torch.empty(3, device=device).isnan().all()
