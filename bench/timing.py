"""How a call is timed and what memory it takes, apart from what is called: rounds, rotation, events, graphs, meters.

On CUDA a time is the median of device events. Inputs rotate among sets that together pass the L2 cache three times
over, so that no round finds its inputs there; a sleeping kernel goes first, so that the host has queued the rounds
before the first one runs. Small operators are timed inside a replayed CUDA graph, free of launch gaps.
"""

import math
import statistics
import time

import torch

_PASSES = 3  # how many times the sets together exceed the cache
_SLEEP = 10_000_000  # clock cycles: some 5 ms
_GRAPH_CALLS = 20  # at least so many in one graph: a replay's own cost is shared by them


class Deadline:
    """Says when to stop starting new measurements."""

    def __init__(self, seconds=None, clock=time.monotonic):
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def passed(self):
        return self._end is not None and self._clock() >= self._end


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def tensor_bytes(value):
    """Memory behind all tensors of nested arguments; what several share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(value)}.values())


def sets_needed(set_bytes, cache_bytes):
    """How many input sets pass a cache of `cache_bytes`; one where it is not to be passed (0)."""
    return max(1, math.ceil(_PASSES * cache_bytes / max(set_bytes, 1)))


def rounds_for(seconds, budget=0.4, least=7, most=100):
    """Rounds that fit a budget of time: many of a short call, never too few for a median."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def time_rounds(calls, rounds, new_event, synchronize):
    """Seconds of each round between two events; round r runs call r modulo their number."""
    marks = []
    for r in range(rounds):
        start, end = new_event(), new_event()
        start.record()
        calls[r % len(calls)]()
        end.record()
        marks.append((start, end))
    synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def summary(seconds):
    return {
        "best": min(seconds),
        "median": statistics.median(seconds),
        "worst": max(seconds),
        "rounds": len(seconds),
    }


def _event():
    return torch.cuda.Event(enable_timing=True)


def _timed(calls, rounds):
    torch.cuda._sleep(_SLEEP)
    return time_rounds(calls, rounds, _event, torch.cuda.synchronize)


def time_events(calls, budget=0.4):
    """Summary of event times on CUDA, after a warm-up that every call takes part in, up to three."""
    for call in calls[:3]:
        call()
    estimate = statistics.median(_timed(calls, 3))
    return summary(_timed(calls, rounds_for(estimate, budget)))


def time_graph(calls, budget=0.2):
    """Summary of the time of one call inside a replayed graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation has no place in a capture
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    repeats = math.ceil(_GRAPH_CALLS / len(calls))
    graph, count = torch.cuda.CUDAGraph(), repeats * len(calls)
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(repeats) for call in calls]
    del kept
    graph.replay()
    estimate = statistics.median(_timed([graph.replay], 3))
    return summary([s / count for s in _timed([graph.replay], rounds_for(estimate, budget))])


class CudaMeter:
    """Allocated bytes of the current device, now and at their highest."""

    def settle(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def allocated(self):
        return torch.cuda.memory_allocated()

    def reset_peak(self):
        torch.cuda.reset_peak_memory_stats()

    def peak(self):
        return torch.cuda.max_memory_allocated()


def measure_memory(forward, backward, meter):
    """Bytes that one call takes beyond its inputs.

    `held_bytes` is what stays allocated between `forward()` and `backward(out)` beside the outputs themselves: the
    activation memory (0 if nothing is recorded); `peak_bytes` the most at any moment, outputs and gradients included.
    """
    meter.settle()
    before = meter.allocated()
    meter.reset_peak()
    out = forward()
    held = meter.allocated() - before - tensor_bytes(out)
    grads = backward(out)
    del out, grads
    return {"held_bytes": held, "peak_bytes": meter.peak() - before}


def rate(call, amount, device, repeats=7):
    """`amount` over the seconds of `call()`: the median of events on CUDA, elsewhere the best of the wall clock."""
    call()
    if device.type == "cuda":
        return amount / statistics.median(_timed([call], repeats))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return amount / best
