"""The tables of docs/benchmarks.md are what the command makes of the kept records."""

import json
import re

import pytest
from checkout import ROOT

from bench import page, record

PAGE = ROOT / "docs" / "benchmarks.md"


def entry(label, best, suite="moe_ffn", direction="forward", **more):
    sizes = {"t": 512, "h": 64, "i": 128, "e": 8, "k": 2, "s": 1, "routing": "balanced"}
    case = {"suite": suite, "direction": direction, "dtype": "float32", "sizes": sizes, "label": label}
    return case | {"bytes": 0, "flops": 10**9, "outcome": "measured", "timing": "wall", "best": best} | more


@pytest.fixture
def results(tmp_path):
    about = {"rates": {"copy_bytes": 1e10, "mm_flops_float32": 1e11}}
    entries = [
        entry("ummrm", 0.02, noise=0.01, held_bytes=5),
        entry("loop", 0.03, noise=0.04, held_bytes=10),
        entry("dense", 0.01),
        entry("absent", 0) | {"outcome": "not run: it is not installed"},
        entry("ummrm", 0.04, direction="forward+backward"),
        entry("loop", 0.04, "merge"),
    ]
    (tmp_path / "a.json").write_text(json.dumps({"about": about, "entries": entries}))
    entries[0]["best"] = 0.0125
    (tmp_path / "b.json").write_text(json.dumps({"about": about, "entries": entries[:1]}))
    return tmp_path


def lines(block, results):
    text = page.filled(f"before\n<!-- bench {block} -->\nold\n<!-- end -->\nafter\n", results)
    assert page.filled(text, results) == text and text.startswith("before\n<!-- bench") and text.endswith("after\n")
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_ratios_with_the_noise_that_was_measured(results):
    head, _, first, second = lines("ratios moe_ffn a.json", results)
    assert head == "operator | sizes | routing | direction | dtype | ummrm, ms | loop | dense | absent".split(" | ")
    assert first[1:6] == ["T=512, H=64, I=128, E=8, K=2", "balanced", "forward", "float32", "20"]
    assert first[6:] == ["1.50 ± 0.08", "0.50", "not run: it is not installed"]
    assert second[3] == "forward+backward"
    wished = lines("ratios moe_ffn a.json | direction: forward | columns: loop; ummrm, ms", results)
    assert wished == [["loop", "ummrm, ms"], ["---", "---:"], ["1.50 ± 0.08", "20"]]


def test_memory_and_shares_of_the_peak(results):
    assert lines("memory moe_ffn a.json", results)[2][-1] == "0.50"
    head, _, first, second = lines("peaks moe_ffn a.json b.json", results)
    assert head[-2:] == ["a", "b"] and first[-2:] == ["0.50 ± 0.01", "0.80 ± 0.01"] and second[5] == "0.25"


def test_rows_that_a_program_made(results):
    rows = [{"suite": "step", "cells": {"model": m, "ms": str(i)}} for i, m in enumerate("ab")]
    rows.append({"suite": "other", "cells": {"model": "c"}})
    (results / "s.json").write_text(json.dumps({"about": {"rates": {}}, "entries": rows}))
    assert lines("cells step s.json s.json", results)[2:] == [["a", "0"], ["b", "1"]] * 2
    assert lines("cells step s.json | model: b | columns: ms", results)[2:] == [["1"]]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("speeds moe_ffn a.json", "one of ratios, memory, peaks, cells, got 'speeds'"),
        ("ratios merge a.json", "must hold measured entries of merge"),
        ("ratios moe_ffn a.json | columns: other", "has the columns operator; .*, got 'other'"),
        ("ratios moe_ffn a.json | dtype: float16", "has the cells float32, got 'float16'"),
    ],
)
def test_a_table_that_cannot_be_made_says_why(results, block, message):
    with pytest.raises(ValueError, match=message):
        lines(block, results)


def test_a_table_without_an_end():
    with pytest.raises(ValueError, match="needs an `<!-- end -->`"):
        page.filled("<!-- bench ratios moe_ffn a.json -->\n| a |\n")


@pytest.mark.skipif(not any(record.RESULTS.glob("*.json")), reason="the archive holds no records")
def test_the_page_is_what_the_command_makes():
    text = PAGE.read_text()
    assert len(re.findall(r"^<!-- bench ", text, re.M)) >= 4
    assert page.filled(text) == text, "run `python -m bench.page docs/benchmarks.md`"
