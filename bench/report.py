"""Runs every suite, prints the ratios, and writes the record to bench/results/.

    python -m bench.report [--device cpu] [--threads n] [-k expression]

A ratio is the contender's time over ummrm's in the same run: above 1, ummrm is faster. "of peak" is bytes over the
copy bandwidth, or FLOPs over the mm rate, both measured in the same run. Both are taken from the best round: whatever a
round takes longer is the machine's other work. The median stands beside it, to show how much of that there was.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(device, threads, expression):
    """The record of one run of the suites, as pytest-benchmark and conftest.py write it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        arguments = [str(HERE), "-q", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
        arguments += ["-p", "no:cacheprovider", "--benchmark-disable-gc", f"--benchmark-json={output}"]
        arguments += [f"--device={device}", "--benchmark-columns=median", "--benchmark-warmup=off"]
        arguments += [] if threads is None else [f"--threads={threads}"]
        code = pytest.main(arguments + (["-k", expression] if expression else []))
        if code != 0:
            sys.exit(f"a suite failed (pytest exit status {int(code)}): no report")
        return json.loads(output.read_text())


def rows(record):
    """One row for each contender: group, label, best and median seconds, ratio to ummrm, fraction of peak, shape."""
    rates, groups = record["ummrm"]["rates"], {}
    for benchmark in record["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark)
    for group, contenders in groups.items():
        ours = [b["stats"]["min"] for b in contenders if b["extra_info"]["label"] == "ummrm"]
        for b in contenders:
            info, best = b["extra_info"], b["stats"]["min"]
            peak = None
            if info["bytes"]:
                peak = info["bytes"] / best / rates["copy_bytes"]
            elif info["flops"]:
                peak = info["flops"] / best / rates[f"mm_flops_{info['dtype']}"]
            ratio = best / ours[0] if ours else None
            yield group, info["label"], best, b["stats"]["median"], ratio, peak, info["shape"]


def table(record):
    """The rows as text, with what they were measured on at the head."""
    about = record["ummrm"]
    rates = ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in about["rates"].items())
    lines = [
        f"device {about['device']}, {about['threads']} threads, load average {about['load_average'][0]:.1f}",
        f"commit {about['commit']}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
        f"allocator: {about['allocator']}",
        f"measured rates: {rates}",
        "",
        f"{'':26}{'best ms':>11}{'median ms':>11}{'over ummrm':>12}{'of peak':>9}",
    ]
    last = None
    for group, label, best, median, ratio, peak, shape in rows(record):
        if group != last:
            lines += ["", f"{group}   [{shape}]"]
            last = group
        ratio = "" if ratio is None else f"{ratio:.2f}"
        peak = "" if peak is None else f"{peak:.2f}"
        lines.append(f"  {label:24}{best * 1e3:11.3f}{median * 1e3:11.3f}{ratio:>12}{peak:>9}")
    for reason, count in Counter(line.split(": ", 1)[1] for line in about["skipped"]).items():
        lines += ["", f"{count} contenders not run: {reason}"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; fewer than cores where other work shares the machine")
    parser.add_argument("-k", dest="expression", default="", help="only suites that match, as in pytest")
    options = parser.parse_args()
    record = run(options.device, options.threads, options.expression)
    text = table(record)
    print(text)
    if not options.expression:
        threads = f"-{options.threads}threads" if options.threads else ""
        name = f"{options.device}{threads}-{record['datetime'][:10]}-{record['ummrm']['commit'][:12]}"
        kept = {key: record[key] for key in ("datetime", "ummrm")}  # the rest names the host and its user
        kept["benchmarks"] = [
            {"group": b["group"], **b["extra_info"], **{k: b["stats"][k] for k in ("min", "median", "max", "rounds")}}
            for b in record["benchmarks"]
        ]
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        (HERE / "results" / f"{name}.txt").write_text(text + "\n")
        print(f"\nwritten: bench/results/{name}.json and .txt")


if __name__ == "__main__":
    main()
