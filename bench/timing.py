"""How calls are timed and what memory they take, apart from what is called: turns, rotation, events, graphs, meters.

What is compared is measured turn by turn, side by side: other work on the machine falls on all. On a CPU a turn is one
round on the wall clock, and the figure is the best: whatever a round takes longer is the machine's other work. On CUDA
a turn is some rounds, and a time is the median of device events. Inputs rotate among sets that together pass the L2
cache three times over, so that no round finds its inputs there; a sleeping kernel goes first, so that the host has
queued the rounds before the first one runs. Small operators are timed inside a replayed CUDA graph, without gaps.
"""

import math
import statistics
import time

import torch

PARTS = 3  # into which turns are dealt out to say how far a figure moves
_SLOW = 10  # times the fastest
_SHORT = 0.1  # seconds that nobody need save
_PASSES = 3  # how many times the sets together exceed the cache
_SLEEP = 10_000_000  # clock cycles: some 5 ms
_GRAPH_CALLS = 20  # at least so many in one graph: a replay's own cost is shared by them


class Deadline:
    """Says when to stop starting new measurements."""

    def __init__(self, seconds=None, clock=time.monotonic):
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def passed(self, needed=0):
        """Whether fewer seconds than `needed` are left, or none."""
        return self._end is not None and self._clock() + needed >= self._end


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


def side_by_side(samplers, turns, more=lambda: True):
    """Seconds that each sampler's rounds took, turn by turn.

    Args:
        samplers: each runs some rounds when called and returns their seconds.
        turns: how often each is called, by sampler; in every turn another one goes first.
        more: asked after each turn whether there is time for another; three are run whatever it says.

    Returns:
        For each sampler, a list of seconds for each turn.
    """
    found = [[] for _ in samplers]
    for turn in range(max(turns, default=0)):
        for i in range(len(samplers)):
            at = (i + turn) % len(samplers)
            if turn < turns[at]:
                found[at].append(samplers[at]())
        if turn + 1 >= PARTS and not more():
            break
    return found


def noise(turns, figure):
    """How far a figure may be off: what lies between its largest and its smallest over three parts of the turns.

    Every third turn is a part. Two figures of equal work differ by less than their noises together in 97 of a hundred
    measurements or more, on a quiet machine and on a busy one (simulated: jitter, bursts of other work, one of the two
    disturbed in most of its rounds). One turn says nothing of noise: infinity.
    """
    parts = [[s for turn in turns[i::PARTS] for s in turn] for i in range(min(PARTS, len(turns)))]
    figures = [figure(part) for part in parts]
    return max(figures) / min(figures) - 1 if len(figures) > 1 else math.inf


def wall(call):
    """A sampler of one round on the wall clock."""

    def sample():
        start = time.perf_counter()
        call()
        return [time.perf_counter() - start]

    return sample


def turns_for(seconds, budget):
    """How many turns of each sampler fit a budget of time, as many in every part; `seconds` says what a call takes.

    What takes ten times as long as the fastest, and long, has three turns: more would say nothing of who is ahead.
    """
    slow = [s > max(_SLOW * min(seconds), _SHORT) for s in seconds]
    turn = sum(s for s, is_slow in zip(seconds, slow, strict=True) if not is_slow)
    many = PARTS * rounds_for(PARTS * turn, budget, least=2, most=10)
    return [PARTS if is_slow else many for is_slow in slow]


def _event():
    return torch.cuda.Event(enable_timing=True)


def _timed(calls, rounds):
    torch.cuda._sleep(_SLEEP)
    return time_rounds(calls, rounds, _event, torch.cuda.synchronize)


def _sampler(calls, budget, share=1):
    """A sampler of device events, of so many rounds that three turns fill the budget."""
    rounds, begun = math.ceil(rounds_for(statistics.median(_timed(calls, 3)), budget) / PARTS), 0

    def sample():
        nonlocal begun
        first, begun = begun % len(calls), begun + rounds
        return [seconds / share for seconds in _timed(calls[first:] + calls[:first], rounds)]

    return sample


def events(calls, budget=0.4):
    """A sampler of event times on CUDA, after a warm-up that every call takes part in, up to three."""
    for call in calls[:3]:
        call()
    return _sampler(calls, budget)


def graph(calls, budget=0.2):
    """A sampler of the time of one call inside a replayed graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation has no place in a capture
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    repeats = math.ceil(_GRAPH_CALLS / len(calls))
    captured, count = torch.cuda.CUDAGraph(), repeats * len(calls)
    with torch.cuda.graph(captured):
        kept = [call() for _ in range(repeats) for call in calls]
    del kept
    captured.replay()
    return _sampler([captured.replay], budget, count)


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


def saved_bytes(forward, inputs):
    """What autograd keeps for a backward beside inputs and outputs, on devices whose allocator does not count."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for tensor in tensors_in([inputs, out]):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return {"held_bytes": sum(kept.values())}


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
