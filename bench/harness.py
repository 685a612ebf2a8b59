"""One contender at a time: builds its inputs, compares it with the reference, measures memory and time, records it.

A suite calls `contest` once for each contender of a case; the ratios between them, from one run on one machine, are the
result. Whatever happens to a contender is an entry of the record: measured, out of memory, not run for want of time, or
failed. Nothing here asserts a time.
"""

import functools
import gc
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import ummrm
from ummrm.ops import backends, library

from . import timing
from .workload import Layer

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # of the largest value: contenders round at different places


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """What contenders compete at.

    Attributes:
        suite: what is measured; with direction, dtype and layer it names the case.
        layer: its sizes.
        dtype: of the tensors that dominate it.
        direction: "forward" or "forward+backward"; the harness runs backward where it is asked for.
        bytes: least traffic through memory, each input read once and each output written once; 0: not bound by it.
        flops: operations of its matrix products; 0: none.
    """

    suite: str
    layer: Layer
    dtype: torch.dtype
    direction: str = "forward"
    bytes: int = 0
    flops: int = 0

    @property
    def backward(self):
        return self.direction == "forward+backward"

    def entry(self):
        return {
            "suite": self.suite,
            "direction": self.direction,
            "dtype": name_of(self.dtype),
            "sizes": self.layer.sizes,
            "bytes": self.bytes,
            "flops": self.flops,
        }


class Call:
    """One input set under one function: a forward, and a backward from output gradients that are the same for all."""

    def __init__(self, function, arguments, backward):
        self._function, self._arguments, self._backward = function, arguments, backward
        self._leaves = [t for t in timing.tensors_in(arguments) if t.requires_grad]
        self._grads = None

    def forward(self):
        with torch.set_grad_enabled(self._backward):
            out = self._function(**self._arguments)
        return list(out) if isinstance(out, (list, tuple)) else [out]

    def backward(self, out):
        """Gradients of all inputs that need one; nothing where the call only goes forward."""
        if not self._backward:
            return []
        roots = [o for o in out if o.requires_grad]
        if self._grads is None:
            generator = torch.Generator(roots[0].device).manual_seed(7)
            like = [{"dtype": o.dtype, "device": o.device, "generator": generator} for o in roots]
            self._grads = [torch.randn(o.shape, **options) for o, options in zip(roots, like, strict=True)]
        return list(torch.autograd.grad(roots, self._leaves, self._grads, allow_unused=True))

    def results(self):
        """Outputs, then gradients."""
        out = self.forward()
        return [o.detach() for o in out] + self.backward(out)

    def __call__(self):
        out = self.forward()
        return self.backward(out) if self._backward else out


def assert_same(label, got, want, dtype):
    """Holds results to a few roundings of their largest value, not to each other's bits; indices to equality."""
    for a, b in zip(got, want, strict=True):
        if b is None or not b.is_floating_point():
            assert b is None or torch.equal(a.to(b.dtype), b), f"{label}: indices differ"
            continue
        error, scale = (a.float() - b.float()).abs().max().item(), b.abs().max().item()
        assert error <= TOLERANCE[dtype] * scale, f"{label}: differs by {error:.3g} at values up to {scale:.3g}"


class Contest:
    """contest(case, label, function, make, ...): see the module's head.

    Args of a call:
        function: takes the arguments that `make()` returns, by name, and returns a tensor or several.
        make: builds one set of random arguments; called again for every further set.
        reference: function whose outputs and gradients the contender's must match, or None if it computes something
            else by design.
        graph: time it inside a replayed CUDA graph (on CUDA only).
        rounds: on the CPU, how many.
    """

    def __init__(self, device, recorder, deadline, benchmark, skip):
        self._device, self._recorder, self._deadline = device, recorder, deadline
        self._benchmark, self._skip = benchmark, skip

    def __call__(self, case, label, function, make, reference=None, graph=False, rounds=7):
        entry = case.entry() | {"label": label, "compared": reference is not None}
        if self._deadline.passed():
            entry["outcome"] = "not run: time"
        elif case.flops and self._device.type == "cpu" and (reason := no_native_gemm(case.dtype, self._device)):
            entry["outcome"] = f"not run: {reason}"
        else:
            try:
                entry |= self._measure(case, label, function, make, reference, graph, rounds)
                entry["outcome"] = "measured"
            except torch.OutOfMemoryError:
                entry["outcome"] = "out of memory"
            except Exception as error:
                entry["outcome"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self._recorder.write("entry", entry)
                raise
        self._recorder.write("entry", entry)
        if entry["outcome"] == "out of memory":  # here the frames that held the tensors are gone
            self._free()
        if entry["outcome"] != "measured":
            self._skip(entry["outcome"])

    def _set(self, make, index):
        torch.manual_seed(index)
        return make()

    def _measure(self, case, label, function, make, reference, graph, rounds):
        first = self._set(make, 0)
        call = Call(function, first, case.backward)
        compared = reference is not None and self._compare(label, call, Call(reference, first, case.backward), case)
        if self._device.type != "cuda":
            return self._wall(call, rounds) | {"compared": compared}
        call()  # what libraries allocate once is no contender's
        memory = timing.measure_memory(call.forward, call.backward, timing.CudaMeter())
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        count = timing.sets_needed(timing.tensor_bytes(first), cache)
        calls = [call] + [Call(function, self._set(make, i), case.backward) for i in range(1, count)]
        times = timing.time_graph(calls) if graph else timing.time_events(calls)
        how = {"timing": "graph" if graph else "events", "input_sets": count, "compared": compared}
        return {**times, **memory, **how}

    def _compare(self, label, call, reference, case):
        """Whether they could be compared: a reference for which there is no memory is no fault of the contender's."""
        try:
            want = reference.results()
        except torch.OutOfMemoryError:
            want = None
        if want is None:
            self._free()
            return False
        assert_same(label, call.results(), want, case.dtype)
        return True

    def _free(self):
        gc.collect()
        timing.CudaMeter().settle()

    def _wall(self, call, rounds):
        benchmark = self._benchmark()
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)
        return timing.summary(benchmark.stats.stats.data) | {"timing": "wall", "input_sets": 1}


@functools.cache
def machine_rates(device):
    """What this machine reaches in this run: bytes copied a second (reads and writes) and mm FLOPs a second."""
    source = torch.randn((256 if device.type == "cuda" else 32) << 20, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    rates = {"copy_bytes": timing.rate(copy, 2 * source.numel() * 4, device)}
    del source, target, copy
    n = 512 if device.type == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        call = functools.partial(torch.mm, a, b, out=out)
        rates[f"mm_flops_{name_of(dtype)}"] = timing.rate(call, 2 * n**3, device)
    return rates


_SLOW = 0.1  # of the fp32 rate


def no_native_gemm(dtype, device):
    """Why products in `dtype` are not worth timing here, or None: only mm's fallback would be timed."""
    rates = machine_rates(device)
    rate = rates[f"mm_flops_{name_of(dtype)}"]
    if rate >= _SLOW * rates["mm_flops_float32"]:
        return None
    return f"torch.mm in {name_of(dtype)} reaches {rate / 1e9:.1f} GFLOP/s here, less than a tenth of fp32's"


def _git(*words):
    """What git says of this checkout; nothing where it is not installed or this is no repository."""
    try:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""


def _commit():
    dirty = _git("status", "--porcelain", "--untracked-files=no").strip()
    return (_git("rev-parse", "HEAD").strip() or "unknown") + ("+changes" if dirty else "")


def _cpu():
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def about(device):
    """What the figures of a run were measured on, and with what."""
    record = {
        "device": _cpu(),
        "backend": backends.backend_for(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "commit": _commit(),
        "versions": {
            "ummrm": ummrm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "build": library.build_info(),
        "allocator": {
            name: os.environ.get(name, "default")
            for name in ("GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")
        },
        "rates": machine_rates(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {"device": properties.name, "l2_bytes": properties.L2_cache_size, "memory": properties.total_memory}
        record["versions"]["cuda"] = torch.version.cuda
        record["tile_table"] = repr(library.tile_table())
    return record
