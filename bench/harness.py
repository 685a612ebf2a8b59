"""All contenders of a case: builds inputs, compares each with the reference, measures its memory, times all together.

A suite calls `contest` once for each case; the ratios between contenders, timed turn by turn side by side in one run on
one machine, are the result. Whatever happens to a contender is an entry of the record: measured, out of memory, not run
for the reason that it says, or failed. Nothing here asserts a time.
"""

import functools
import gc
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

import ummrm
from ummrm.ops import backends, library

from . import timing
from .contender import Contender
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

    @property
    def bounds(self):
        """Names of the rates that bound it."""
        kinds = {"copy_bytes": self.bytes, f"mm_flops_{name_of(self.dtype)}": self.flops}
        return [name for name, amount in kinds.items() if amount]

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


def assert_same(got, want, dtype):
    """Holds results to a few roundings of their largest value, not to each other's bits; indices to equality."""
    for a, b in zip(got, want, strict=True):
        if b is None or not b.is_floating_point():
            assert b is None or torch.equal(a.to(b.dtype), b), "indices differ"
            continue
        error, scale = (a.float() - b.float()).abs().max().item(), b.abs().max().item()
        assert error <= TOLERANCE[dtype] * scale, f"differs by {error:.3g} at values up to {scale:.3g}"


BUDGET = 3.0  # seconds of a case's turns on a CPU; six turns are run whatever they take


class Contest:
    """contest(case, contenders, make, reference): see the module's head.

    Args of a call:
        contenders: by label; a function, a `Contender`, or the reason why it can't be run here.
        make: builds the inputs that contenders share.
        reference: what they are compared with, or None.
    """

    def __init__(self, device, recorder, deadline, skip):
        self._device, self._recorder, self._deadline, self._skip = device, recorder, deadline, skip

    def __call__(self, case, contenders, make=None, reference=None):
        ready, entries, errors, self._wanted = {}, {}, [], {}
        late = self._deadline.passed(self._least_seconds(case, len(contenders)))
        for label, contender in contenders.items():
            if callable(contender):
                contender = Contender(contender)
            own = isinstance(contender, str) or contender.make is not None
            if not own:
                contender = replace(contender, make=make, reference=contender.reference or reference)
            entries[label] = case.entry() | {"label": label, "compared": False}
            if reason := self._not_run(case, contender, late):
                entries[label]["outcome"] = f"not run: {reason}"
                continue
            entries[label]["compared"] = contender.reference is not None
            if contender.bytes is not None:
                entries[label]["bytes"] = contender.bytes
            if found := self._attempt(entries[label], contender, errors, lambda c=contender: self._prepare(case, c)):
                entries[label] |= found
                ready[label] = contender
        self._wanted = {}
        self._time(case, ready, entries, errors)
        for entry in entries.values():
            self._recorder.write("entry", entry)
        if errors:
            raise errors[0]
        if not ready:
            self._skip("; ".join(dict.fromkeys(entry["outcome"] for entry in entries.values())))

    def _least_seconds(self, case, count):
        """What a case takes at least on a CPU: eight times every contender, as fast as mm."""
        if self._device.type != "cpu" or not case.flops:
            return 0
        return 8 * count * case.flops / machine_rates(self._device)[f"mm_flops_{name_of(case.dtype)}"]

    def _not_run(self, case, contender, late):
        if isinstance(contender, str):
            return contender
        if late or self._deadline.passed():
            return "time"
        return no_native_gemm(case.dtype, self._device) if case.flops and self._device.type == "cpu" else None

    def _attempt(self, entry, contender, errors, work):
        """What `work` returns; None where it fails, which `entry` then says."""
        try:
            return work()
        except torch.OutOfMemoryError:
            entry["outcome"] = "out of memory"
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            entry["outcome"] = f"not run: {said}" if contender.foreign else f"failed: {said}"
            if not contender.foreign:
                errors.append(error)
            return None
        self._free()  # here the frames that held the tensors are gone
        return None

    def _set(self, make, index):
        torch.manual_seed(index)
        return make()

    def _prepare(self, case, contender):
        """Compares a contender with its reference and measures its memory; returns what is then known of it."""
        first = self._set(contender.make, 0)
        call, reference = Call(contender.function, first, case.backward), contender.reference
        known = {"compared": reference is not None and self._compare(call, contender, first, case)}
        if self._device.type != "cuda":
            return known | timing.saved_bytes(call.forward, first)
        call()  # what libraries allocate once is no contender's
        return known | timing.measure_memory(call.forward, call.backward, timing.CudaMeter())

    def _compare(self, call, contender, inputs, case):
        """Whether they could be compared: a reference for which there is no memory is no fault of the contender's."""
        key = contender.make, contender.reference
        want = self._wanted.get(key)
        if want is None:
            try:
                want = Call(contender.reference, inputs, case.backward).results()
            except torch.OutOfMemoryError:
                pass
        if want is None:
            self._free()
            return False
        if self._device.type != "cuda":  # where memory is for the contenders
            self._wanted[key] = want
        assert_same(call.results(), want, case.dtype)
        return True

    def _time(self, case, ready, entries, errors):
        """Times all side by side; where memory does not hold the inputs of all, one after the other."""
        try:
            self._side_by_side(case, ready, entries)
            return
        except torch.OutOfMemoryError:
            pass
        except Exception:  # each alone will say whose it is
            pass
        self._free()
        for label, contender in ready.items():
            work = functools.partial(self._side_by_side, case, {label: contender}, entries)
            self._attempt(entries[label], contender, errors, work)

    def _side_by_side(self, case, contenders, entries):
        if not contenders:
            return
        cuda, sets, samplers, facts = self._device.type == "cuda", {}, [], []
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size if cuda else 0
        for contender in contenders.values():
            made = sets.setdefault(contender.make, [])
            if not made:
                made.append(self._set(contender.make, 0))
                count = timing.sets_needed(timing.tensor_bytes(made[0]), cache)
                made += [self._set(contender.make, i) for i in range(1, count)]
            calls = [Call(contender.function, one, case.backward) for one in made]
            if cuda:
                samplers.append((timing.graph if contender.graph else timing.events)(calls))
            else:
                samplers.append(timing.wall(calls[0]))
            how = ("graph" if contender.graph else "events") if cuda else "wall"
            facts.append({"timing": how, "input_sets": len(made), "beside": len(contenders) - 1})
        ceilings = {} if cuda else {name: _ceiling(name, self._device) for name in case.bounds}
        gc.disable()
        try:
            warm = [min(sum(sample()) for _ in range(2)) for sample in samplers] if not cuda else []
            turns = [timing.PARTS] * len(samplers) if cuda else timing.turns_for(warm, BUDGET)
            turns += [2 * timing.PARTS] * len(ceilings)
            samplers += [timing.wall(call) for _, call in ceilings.values()]
            found = timing.side_by_side(samplers, turns, lambda: not self._deadline.passed())
        finally:
            gc.enable()
        rates = {}
        for (name, (amount, _)), turns in zip(ceilings.items(), found[len(contenders) :], strict=True):
            rates[name] = amount / min(s for turn in turns for s in turn)
        for label, turns, fact in zip(contenders, found, facts, strict=False):
            seconds = [s for turn in turns for s in turn]
            figure = min if fact["timing"] == "wall" else statistics.median
            entries[label] |= timing.summary(seconds) | {"noise": timing.noise(turns, figure)} | fact
            if rates:
                entries[label]["rates"] = rates
            entries[label]["outcome"] = "measured"
            self._recorder.write("rounds", {**entries[label], "seconds": seconds})

    def _free(self):
        gc.collect()
        if self._device.type == "cuda":
            timing.CudaMeter().settle()


@functools.cache
def _ceiling(name, device):
    """(amount, call) by which a machine's rate is measured: "copy_bytes" (reads and writes) or "mm_flops_<dtype>"."""
    if name == "copy_bytes":
        source = torch.randn((256 if device.type == "cuda" else 32) << 20, device=device)
        return 2 * source.numel() * 4, functools.partial(torch.empty_like(source).copy_, source)
    n, dtype = 512 if device.type == "cpu" else 8192, getattr(torch, name.removeprefix("mm_flops_"))
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3, functools.partial(torch.mm, a, b, out=torch.empty_like(a))


@functools.cache
def machine_rates(device):
    """What this machine reaches before a run: bytes copied a second and mm FLOPs a second."""
    rates = {}
    for name in ("copy_bytes", "mm_flops_float32", "mm_flops_bfloat16"):
        amount, call = _ceiling(name, device)
        rates[name] = timing.rate(call, amount, device)
        if device.type == "cuda":
            _ceiling.cache_clear()  # its memory is for the contenders
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
