"""The tests that need a GPU: `pytest tests/gpu`. `--device cpu` rehearses their bodies where there is none.

Without a CUDA device, or with an extension that has no CUDA kernels, the whole folder is skipped and says why; whoever
needs it to have run (bench/gpu_stages.py) counts what passed.
"""

import os
from pathlib import Path

import pytest
import torch

from ummrm import _library

HERE = Path(__file__).parent


def obstacle(device):
    """Why the tests cannot run on `device`, or None."""
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here; `--device cpu` rehearses these tests"
    if not _library.build_info()["cuda_archs"]:
        return "the extension was built without CUDA kernels"
    return None


class Skipped(pytest.Module):
    """A file none of whose tests can run: one skip that says why, instead of one for each test."""

    def collect(self):
        pytest.skip(obstacle(torch.device(self.config.getoption("--device"))), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if obstacle(torch.device(parent.config.getoption("--device"))):
        return Skipped.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(config, items):
    on_cpu = torch.device(config.getoption("--device")).type == "cpu"
    for item in items:
        if on_cpu and HERE in item.path.parents and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="says nothing of a CPU"))


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def machine(device):
    """fp32 products in fp32, whatever the machine's configuration says; the reference on all of its cores."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        torch.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.fixture
def poisoned(poisoned, device):
    """As elsewhere, and on CUDA the allocator's free blocks hold NaN as well, which workspaces are cut from."""
    if device.type == "cuda":
        blocks = [torch.full((2**size,), float("nan"), device=device) for size in (8, 8, 12, 14, 16, 16, 18, 22, 24)]
        del blocks
        assert torch.empty(3, device=device).isnan().all()
