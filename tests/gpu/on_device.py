"""Runs operators on a device with arguments that live on the CPU, and gives what CUDA alone has: graphs, streams, the
detection of synchronisation. On the CPU these have stand-ins, so that tests can be rehearsed."""

import contextlib

import torch


def as_they_are(tensor):
    return tensor


def interleaved(tensor):
    """The same values, every other column of a wider tensor; differentiable, unlike `op_inputs.strided`."""
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2] if tensor.dim() else tensor


def by_columns(tensor):
    """The same values with the last two dimensions stored the other way round."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def moved(value, device, layout=as_they_are):
    """Tensors of nested arguments on `device` in a layout; gradients flow back to the originals."""
    if isinstance(value, dict):
        return {name: moved(item, device, layout) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [moved(item, device, layout) for item in value]
    return layout(value.to(device)) if isinstance(value, torch.Tensor) else value


def listed(out):
    return list(out) if isinstance(out, (list, tuple)) else [out]


def on(device, op, layout=as_they_are):
    """`op` for CPU arguments: runs on `device`, and brings outputs and gradients back."""
    return lambda **arguments: [o.cpu() for o in listed(op(**moved(arguments, device, layout)))]


def own(value, device):
    """Copies of nested arguments on `device`, leaves again where they were leaves."""
    if isinstance(value, dict):
        return {name: own(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [own(item, device) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to(device).requires_grad_(value.requires_grad)
    return value


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def overwrite(arguments, others):
    """Puts the values of `others` into the tensors of `arguments`."""
    with torch.no_grad():
        for mine, other in zip(tensors_in(arguments), tensors_in(others), strict=True):
            mine.copy_(other)


class Step:
    """A forward and a backward of an operator on given arguments; output gradients are made ahead, not by a call."""

    def __init__(self, op, arguments, grads=None):
        self.op, self.arguments = op, arguments
        self.leaves = [t for t in tensors_in(arguments) if t.requires_grad]
        if grads is None:
            outputs = listed(op(**arguments))
            grads = [torch.randn_like(o) if o.requires_grad else None for o in outputs]
        self.grads = grads

    def __call__(self):
        out = listed(self.op(**self.arguments))
        pairs = [(o, g) for o, g in zip(out, self.grads, strict=True) if o.requires_grad]
        if not pairs:
            return out
        roots, grads = zip(*pairs, strict=True)
        return [o.detach() for o in out] + list(torch.autograd.grad(roots, self.leaves, grads))


class Capture:
    """A call captured in a CUDA graph; `out` is what the last replay wrote. On the CPU a replay is a call."""

    def __init__(self, call, device):
        self._call, self._cuda = call, device.type == "cuda"
        if not self._cuda:
            self.out = [o.clone() for o in call()]
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.out = call()

    def replay(self):
        if self._cuda:
            self._graph.replay()
            torch.cuda.synchronize()
        else:
            for mine, new in zip(self.out, self._call(), strict=True):
                mine.copy_(new)


@contextlib.contextmanager
def no_synchronisation(device):
    """Raises where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def late_stream(device):
    """Another stream than the default one, with a long sleep at its head: who does not wait for it reads too early."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        yield
    stream.synchronize()


def assert_same_bits(left, right):
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"tensor {i} differs"
