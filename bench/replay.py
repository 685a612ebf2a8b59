"""Hands a run's rounds to pytest-benchmark, so that it keeps files of its own which its users' tools read and compare.

pytest-benchmark times one function by itself, which is not how contenders are measured here. So its fixture is run once
more, on a clock that tells the measured rounds again; names, statistics, machine and commit are then its own.

    pytest-benchmark --storage bench/results/pytest-benchmark compare 0001 0002 --group-by group
"""

import json
from pathlib import Path

import pytest

from .record import RESULTS

STORAGE = RESULTS / "pytest-benchmark"


class _Told:
    """A clock that goes on by what a round took."""

    def __init__(self):
        self.now = 0.0


_TOLD = _Told()


def told():
    return _TOLD.now


class Rounds:
    """A pytest plugin: one item for each contender that was measured."""

    def __init__(self, measured):
        self._measured = {f"{_case(entry)} {entry['label']}": entry for entry in measured}

    def pytest_generate_tests(self, metafunc):
        # by name: pytest-benchmark writes parameters down, and the rounds would double its file
        metafunc.parametrize("measured", self._measured, indirect=True)

    @pytest.fixture
    def measured(self, request):
        return self._measured[request.param]


def _case(entry):
    sizes = " ".join(f"{name.upper()}={entry['sizes'][name]}" for name in "thieks")
    return f"{entry['suite']} {entry['direction']} {entry['dtype']} {sizes} {entry['sizes']['routing']}"


@pytest.mark.benchmark(timer=told)
def bench_rounds(benchmark, measured):
    seconds = iter(measured["seconds"])

    def again():
        _TOLD.now += next(seconds)

    benchmark.group = _case(measured)
    benchmark.extra_info.update({name: measured[name] for name in ("label", "timing", "noise", "compared")})
    benchmark.pedantic(again, rounds=len(measured["seconds"]))


def read_rounds(path):
    """What a recorder's file holds of rounds."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith('{"rounds"')]
    return [line["rounds"] for line in lines]


def keep(measured, name, storage=STORAGE):
    """Has pytest-benchmark save the rounds under its next number and `name`; returns its exit status."""
    arguments = [str(Path(__file__)), "--noconftest", "-q", "-o", "python_files=replay.py", "--import-mode=append"]
    arguments += ["-o", "python_functions=bench_*", "-p", "no:cacheprovider", "--no-header", "-rN"]
    arguments += [f"--benchmark-storage=file://{storage}", f"--benchmark-save={name}", "--benchmark-quiet"]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    return int(pytest.main(arguments, plugins=[Rounds(measured)]))
