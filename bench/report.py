"""Runs every suite, prints the ratios, and writes the record to bench/results/.

    python -m bench.report [--device cpu] [--backend name] [--threads n] [-k expression] [--deadline seconds]
                           [--record file]

A ratio is the contender's time over ummrm's in the same run: above 1, ummrm is faster. "of peak" is bytes over the
copy bandwidth, or FLOPs over the mm rate, both measured in the same run. docs/benchmarks.md says how all is measured.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

import ummrm  # noqa: F401  (before pytest puts the checkout, which may hold no extension, on the path)

from . import replay, targets
from .record import OURS, RESULTS, read_record

HERE = Path(__file__).parent


def run(device, threads=None, expression="", deadline=None, record=None, backend=None, fusions=None):
    """The record of one run of the suites, and pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(record or Path(folder) / "record.jsonl").resolve()
        output.unlink(missing_ok=True)
        arguments = [str(HERE), "-q", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
        arguments += ["-p", "no:cacheprovider", "--import-mode=append", "--no-header", "-rN"]
        arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what ummrm has imported
        arguments += [f"--device={device}", f"--record={output}"]
        arguments += [] if backend is None else [f"--backend={backend}"]
        arguments += [] if fusions is None else [f"--fusions={fusions}"]
        arguments += [] if threads is None else [f"--threads={threads}"]
        arguments += [] if deadline is None else [f"--deadline={deadline}"]
        code = pytest.main(arguments + (["-k", expression] if expression else []))
        if not output.exists():
            sys.exit(f"nothing was measured (pytest exit status {int(code)})")
        return read_record(output), int(code)


def rows(record):
    """(heading, entry, ratio to ummrm or None, fraction of peak or None) for each contender, case by case."""
    cases = {}
    for entry in record["entries"]:
        cases.setdefault(targets.Entries.case(entry), []).append(entry)
    for entries in cases.values():
        ours = [e for e in entries if e["label"] == OURS and e["outcome"] == "measured"]
        for e in entries:
            s = e["sizes"]
            sizes = " ".join(f"{name.upper()}={s[name]}" for name in "thieks") + f" {s['routing']}"
            heading = f"{e['suite']} {e['direction']} {e['dtype']}   [{sizes}]"
            if e["outcome"] != "measured":
                yield heading, e, None, None
                continue
            ratio = targets.seconds(e) / targets.seconds(ours[0]) if ours else None
            yield heading, e, ratio, targets.of_peak(e, record["about"]["rates"])


def table(record):
    """The rows as text, with what they were measured on at the head."""
    about = record["about"]
    memory = [name for name in ("held_bytes", "peak_bytes") if any(name in e for e in record["entries"])]
    rates = ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in about["rates"].items())
    lines = [
        f"device {about['device']}, {about['threads']} threads, load average {about['load_average'][0]:.1f}",
        f"ummrm's operators: {about.get('backend', 'compiled')} kernels",
        f"commit {about['commit']}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
        f"allocator: {about['allocator']}",
        f"measured rates: {rates}",
        "",
        f"{'':33}{'best ms':>11}{'median ms':>11}{'noise %':>9}{'over ummrm':>12}{'of peak':>9}"
        + "".join(f"{name.split('_')[0] + ' MiB':>11}" for name in memory),
    ]
    last, left = None, Counter()
    for heading, e, ratio, peak in rows(record):
        if e["outcome"] == "not run: time":
            left[e["outcome"]] += 1
            continue
        if heading != last:
            lines += ["", heading]
            last = heading
        if e["outcome"] != "measured":
            lines.append(f"  {e['label']:31}{e['outcome']}")
            continue
        noise = f"{100 * e['noise']:.1f}" if "noise" in e else ""
        ratio = "" if ratio is None else f"{ratio:.2f}"
        peak = "" if peak is None else f"{peak:.2f}"
        held = "".join(f"{e[name] / 2**20:11.1f}" for name in memory if name in e)
        times = f"{e['best'] * 1e3:11.3f}{e['median'] * 1e3:11.3f}{noise:>9}"
        lines.append(f"  {e['label']:31}{times}{ratio:>12}{peak:>9}{held}")
    for outcome, count in left.items():
        lines += ["", f"{count} contenders {outcome}"]
    return "\n".join(lines)


def text(record):
    """The table, and on CUDA the targets."""
    on_cuda = any(e.get("timing") in ("events", "graph") for e in record["entries"])
    return table(record) + ("\n\n" + targets.targets_table(record) if on_cuda else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="what serves ummrm's operators, as ummrm.use_backend takes it")
    parser.add_argument("--fusions", help="fused CUDA kernels: all, none, or measured, what the tile table says")
    parser.add_argument("--threads", type=int, help="CPU threads; fewer than cores where other work shares the machine")
    parser.add_argument("-k", dest="expression", default="", help="only suites that match, as in pytest")
    parser.add_argument("--deadline", type=float, help="seconds after which no further contender is begun")
    parser.add_argument("--record", type=Path, help="write entries here as they come, and nothing to bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.record or Path(folder) / "record.jsonl"
        limits = options.threads, options.expression, options.deadline, path
        record, code = run(options.device, *limits, options.backend, options.fusions)
        print(text(record))
        if not options.expression and options.record is None and code == 0:
            write(record, replay.read_rounds(path), options)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        sys.exit(f"no suite matches {options.expression!r}")
    if code:
        sys.exit(f"a contender failed (pytest exit status {code}); what was measured stands above")


def write(record, rounds, options, results=RESULTS):
    """Writes what a run leaves: its record, the table, plots, and pytest-benchmark's own file."""
    from . import plots  # matplotlib, which a GPU's bare machine lacks

    threads = f"-{options.threads}threads" if options.threads else ""
    backend = f"-{options.backend}" if options.backend else ""
    name = f"{options.device}{backend}{threads}-{time.strftime('%Y-%m-%d')}-{record['about']['commit'][:12]}"
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / f"{name}.txt").write_text(text(record) + "\n")
    drawn = plots.draw(record, results / name)
    if replay.keep(rounds, name, results / replay.STORAGE.name):
        sys.exit("pytest-benchmark did not keep the rounds; what it said stands above")
    kinds = ", ".join([".json", ".txt", *(path.name.removeprefix(name) for path in drawn)])
    print(f"\nwritten to {results}: {name} ({kinds}), and pytest-benchmark's file in {replay.STORAGE.name}")


if __name__ == "__main__":
    main()
