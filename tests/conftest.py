"""What every test shares: a fresh printed seed, the choice of backend, and poisoned memory."""

import ctypes
import hashlib
import random
import warnings

import pytest
import torch

from ummrm.ops import backends

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # tests/gpu runs on machines that have pytest and torch alone
    settings = None
else:
    common = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("fast", max_examples=100, **common)
    settings.register_profile("full", max_examples=5000, **common)
    settings.load_profile("fast")


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="where tests/gpu runs: cuda, or cpu to rehearse it")
    parser.addoption("--library", help="operators to load over the extension's, as emulated_extension.py builds them")
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs; by default a fresh one")
    parser.addoption("--backend", default=None, help="run every test on this backend, and each once")
    parser.addoption(
        "--at-most", type=int, default=None, help="so many of a test function's parameter sets (of each dtype) alone"
    )


@pytest.hookimpl(tryfirst=True)  # Hypothesis reads its seed in the same hook
def pytest_configure(config):
    seed = config.getoption("--seed")
    # Tensors are small here: a second thread only adds waiting where other work shares the cores (ten times the run
    # time was measured). What must not depend on threads is tested with one and two.
    torch.set_num_threads(1)
    if library := config.getoption("--library"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is the purpose
            torch.ops.load_library(library)
    seed = getattr(config, "workerinput", {}).get("ummrm_seed", seed)
    config.ummrm_seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    if settings is not None and config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = str(config.ummrm_seed)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Gives every process of pytest-xdist the session's seed."""
    node.workerinput["ummrm_seed"] = node.config.ummrm_seed


def pytest_report_header(config):
    return f"ummrm: random inputs from --seed={config.ummrm_seed}; torch {torch.__version__}"


@pytest.fixture(autouse=True)
def seeded(request):
    """Seeds torch and random from the session's seed and the test's name, so that one test can be repeated alone."""
    digest = hashlib.sha256(f"{request.config.ummrm_seed} {request.node.nodeid}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """fp64 has no CUDA kernels: under --library, a test that meets the refusal is skipped."""
    try:
        return (yield)
    except TypeError as error:
        if item.config.getoption("--library") and "on a CUDA device, got float64" in str(error):
            pytest.skip("float64 has no CUDA kernels")
        raise


def pytest_generate_tests(metafunc):
    """Tests that ask for `backend` run once on every backend that can serve the CPU in this process."""
    if "backend" in metafunc.fixturenames:
        rows, only = backends.BACKENDS.items(), metafunc.config.getoption("--backend")
        names = [name for name, backend in rows if "cpu" in backend.served() and backend.obstacle() is None]
        chosen = names[:1] if metafunc.config.getoption("--library") else [only] if only else names
        metafunc.parametrize("backend", chosen, indirect=True)


@pytest.fixture
def backend(request):
    """The backend's name, in use for the test."""
    backends.use_backend(request.param)
    yield request.param
    backends.use_backend(_usual_backend(request.config))


def _usual_backend(config):
    return config.getoption("--backend") or next(iter(backends.BACKENDS))


def pytest_sessionstart(session):
    backends.use_backend(_usual_backend(session.config))


def pytest_collection_modifyitems(config, items):
    """--at-most takes an arbitrary choice of each function's parameter sets, for each dtype, the same in every run."""
    most = config.getoption("--at-most")
    if most is None:
        return
    groups = {}
    for item in sorted(items, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest()):
        dtype = item.callspec.params.get("dtype") if hasattr(item, "callspec") else None
        groups.setdefault((item.function, dtype), []).append(item)
    chosen = {item for group in groups.values() for item in group[:most]}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


_M_PERTURB = -6  # mallopt's parameter, malloc.h of glibc
_PATTERN = 0x80  # glibc fills new memory with its complement: 0x7f7f7f7f is 3.4e38 as a float


@pytest.fixture
def poisoned():
    """Fills new memory before its use: tensors with NaN or the largest integer and, on glibc, every malloc."""
    libc = ctypes.CDLL(None)
    perturb = hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if perturb:
        libc.mallopt(_M_PERTURB, _PATTERN)
    assert torch.empty(3).isnan().all()
    yield
    if perturb:
        libc.mallopt(_M_PERTURB, 0)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def compiled():
    """torch.compile(fullgraph=True) without code generation, which is not what our registrations decide."""
    torch._dynamo.reset()
    return lambda function, **options: torch.compile(function, fullgraph=True, backend="aot_eager", **options)
