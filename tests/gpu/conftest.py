"""The tests that need a GPU: `pytest tests/gpu`. `--device cpu` rehearses their bodies where there is none.

Without a CUDA device, or with an extension that has no CUDA kernels, the whole folder is skipped and says why; whoever
needs it to have run (bench/gpu_stages.py) counts what passed.
"""

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


def pytest_collection_modifyitems(config, items):
    device = torch.device(config.getoption("--device"))
    reason = obstacle(device)
    for item in items:
        if HERE not in item.path.parents:
            continue
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif device.type == "cpu" and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="says nothing of a CPU"))


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def exact_products():
    """fp32 products in fp32, whatever the machine's configuration says."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def poisoned(poisoned, device):
    """As elsewhere, and on CUDA the allocator's free blocks hold NaN as well, which workspaces are cut from."""
    if device.type == "cuda":
        blocks = [torch.full((2**size,), float("nan"), device=device) for size in (8, 8, 12, 14, 16, 16, 18, 22, 24)]
        del blocks
        assert torch.empty(3, device=device).isnan().all()
