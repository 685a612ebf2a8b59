"""Two equal contenders come out equal within the noise that is reported, whatever else the machine does meanwhile."""

import math
import random
import statistics

import checkout  # noqa: F401  (for `bench`)
import pytest
import torch

from bench import timing
from lab.demo import measure


class Machine:
    """A clock, on which equal work takes a second and some jitter, and other work what it takes besides."""

    def __init__(self, seed, disturbance):
        self.random, self.now, self.busy = random.Random(seed), 0.0, False
        self._disturbance = disturbance

    def __call__(self):
        return self.now

    def worker(self, name, seconds=1.0):
        def work(**inputs):
            jitter = 1 + abs(self.random.gauss(0, 0.005))
            self.now += seconds * jitter * self._disturbance(self, name)

        return work


def quiet(machine, name):
    return 1.0


def anybody(machine, name):
    """Other work beside six rounds of ten."""
    return 1 + 1.7 * machine.random.random() if machine.random.random() < 0.6 else 1.0


def one_of_them(machine, name):
    """The same, beside one of the two alone."""
    return anybody(machine, name) if name == "b" else 1.0


def bursts(machine, name):
    """Other work that stays for some rounds, as a compiler does."""
    if machine.random.random() < 0.15:
        machine.busy = not machine.busy
    return 2.7 if machine.busy else 1.0


def measured(machine, monkeypatch, slower=1.0, turns=15):
    """(b's time over a's, the noise of both)"""
    monkeypatch.setattr(timing.time, "perf_counter", machine)
    samplers = [timing.wall(machine.worker("a")), timing.wall(machine.worker("b", slower))]
    a, b = timing.side_by_side(samplers, [turns, turns])
    best = [min(s for turn in one for s in turn) for one in (a, b)]
    return best[1] / best[0], timing.noise(a, min) + timing.noise(b, min)


@pytest.mark.parametrize("disturbance", [quiet, anybody, one_of_them, bursts])
@pytest.mark.parametrize("turns", [6, 15, 30])
def test_equal_contenders_are_equal_within_the_noise(monkeypatch, disturbance, turns):
    """In 190 of 200 measurements; a difference that is there is found where the machine lets it be seen."""
    outside = 0
    for seed in range(200):
        ratio, noise = measured(Machine(seed, disturbance), monkeypatch, turns=turns)
        outside += max(ratio, 1 / ratio) - 1 > noise
    assert outside <= 10
    found = [measured(Machine(seed, disturbance), monkeypatch, 1.3, turns) for seed in range(200)]
    if turns == 30:
        assert statistics.mean(ratio - 1 > noise for ratio, noise in found) > 0.9


def test_one_after_the_other_they_would_not_be(monkeypatch):
    """What the harness did before: each alone. A burst then falls on one of the two, and its rounds agree on it."""
    apart, together = 0, 0
    for seed in range(200):
        machine = Machine(seed, lambda machine, name: 2.7 if machine.now % 120 > 60 else 1.0)
        machine.now = 120 * machine.random.random()
        monkeypatch.setattr(timing.time, "perf_counter", machine)
        alone = [timing.side_by_side([timing.wall(machine.worker(name))], [15])[0] for name in "ab"]
        a, b = (min(s for turn in one for s in turn) for one in alone)
        apart += max(a / b, b / a) - 1 > sum(timing.noise(one, min) for one in alone)
        ratio, noise = measured(machine, monkeypatch)
        together += max(ratio, 1 / ratio) - 1 > noise
    assert apart > 40 and together <= 10


def test_noise_is_what_lies_between_three_parts():
    assert timing.noise([[1.0], [2.0], [4.0], [3.0], [5.0], [6.0]], min) == 3.0  # 1, 2 and 4
    assert timing.noise([[1.0, 3.0], [2.0, 2.0], [2.5, 2.5]], statistics.median) == 0.25
    assert timing.noise([[1.0]], min) == math.inf


def test_turns_go_to_those_who_are_near_the_front():
    assert timing.turns_for([0.01, 0.02, 3.0], 5.0) == [30, 30, 3] and timing.turns_for([1e-4, 0.05], 5.0) == [30, 30]
    assert timing.turns_for([1.0, 2.0], 5.0) == [6, 6] and timing.turns_for([0.2, 0.2], 5.0) == [12, 12]
    seen, left = [], iter([True, False])
    samplers = [lambda n=n: seen.append(n) or [1.0] for n in "ab"]
    assert timing.side_by_side(samplers, [9, 2], lambda: next(left)) == [[[1.0]] * 4, [[1.0]] * 2]
    assert "".join(seen) == "ab" + "ba" + "a" + "a"


@pytest.mark.parametrize("disturbance", [quiet, one_of_them, bursts])
def test_latency_in_reports(monkeypatch, disturbance):
    """Models of the same shape cost the same, within the noise beside it."""
    outside = 0
    for seed in range(200):
        machine = Machine(seed, disturbance)
        monkeypatch.setattr(timing.time, "perf_counter", machine)
        models = {name: machine.worker(name) for name in ("a", "b")}
        found = measure.forward_latency(models, {"x": torch.zeros(1)}, 15)
        assert found["a"].milliseconds >= 1000
        ratio = found["b"].milliseconds / found["a"].milliseconds
        outside += max(ratio, 1 / ratio) - 1 > found["a"].noise + found["b"].noise
    assert outside <= 10
