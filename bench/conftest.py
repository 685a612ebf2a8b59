"""Options, parameters and fixtures of all suites; what they measure with is harness.py and timing.py."""

import time
from pathlib import Path

import pytest
import torch

from ummrm.memory import keep_freed_memory
from ummrm.ops import backends, library

from . import workload
from .harness import Contest, about
from .record import Recorder
from .timing import Deadline


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device type to run on; ummrm needs kernels for it")
    parser.addoption("--backend", default=None, help="what serves ummrm's operators; by default what users get")
    parser.addoption("--fusions", default="measured", help="fused CUDA kernels: all, none, or what the tile table says")
    parser.addoption("--threads", type=int, default=None, help="CPU threads; by default torch's own choice")
    parser.addoption("--record", type=Path, default=None, help="file to write what is measured to, line by line")
    parser.addoption("--deadline", type=float, default=None, help="seconds after which nothing new is begun")


def pytest_configure(config):
    if config.getoption("--backend") is not None:
        backends.use_backend(config.getoption("--backend"))
    library.use_fusions(config.getoption("--fusions"))
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))
    if torch.device(config.getoption("--device")).type == "cpu":
        keep_freed_memory()  # for all contenders: new pages at each call would cost who has large tensors the most
    config.ummrm_deadline = Deadline(config.getoption("--deadline"), time.monotonic)
    config.ummrm_recorder = Recorder(config.getoption("--record"))
    if not config.getoption("collectonly"):
        config.ummrm_recorder.write("about", about(torch.device(config.getoption("--device"))))


def suite_of(function_name):
    return function_name.removeprefix("bench_")


def pytest_generate_tests(metafunc):
    device, suite = torch.device(metafunc.config.getoption("--device")).type, suite_of(metafunc.function.__name__)
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", workload.SIZES[device][suite], ids=str)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", workload.dtypes(suite, device), ids=str)


def pytest_collection_modifyitems(config, items):
    device = torch.device(config.getoption("--device")).type
    items.sort(key=lambda item: workload.importance(suite_of(item.originalname), item.callspec.params, device))


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def contest(request, device):
    return Contest(device, request.config.ummrm_recorder, request.config.ummrm_deadline, pytest.skip)
