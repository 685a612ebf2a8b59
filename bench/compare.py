"""Says case by case whether ummrm became faster from one record to another, as far as their noise lets it be seen.

    python -m bench.compare A B

A and B are files, or the first digits of commits whose records lie in bench/results. B is faster where its time over
A's is below 1 by more than the noise of both. Other contenders of a case ran beside ummrm in both records, and are the
same code while versions are the same: what their times changed by is the machine's doing. Their median change is taken
out of ummrm's, and how far they lie from it, or what they measured of noise themselves, is added to the noise.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from .record import OURS, RESULTS, load
from .targets import Entries, seconds

RESOLUTION = 0.10  # noise above which two equal times would tell nothing
FLOOR = 0.02  # two builds of the same code lie so far apart by where they happen to lie in memory
SETTING = ("device", "backend", "threads")  # what records must share to be of the same machine and work


class Verdict(NamedTuple):
    """What is said of one case: `ratio` is B's time over A's, None where it was not measured in both."""

    case: tuple
    ratio: float | None
    noise: float
    word: str


def noise_of(entry):
    """The entry's own, or for records from before it was measured what lies between best and worst round."""
    return entry["noise"] if "noise" in entry else entry["worst"] / entry["best"] - 1


def verdict(case, first, second):
    """The verdict on a case from the two records' entries of it, by label; only measured ones."""
    if OURS not in first or OURS not in second:
        lacking = " and ".join(name for name, found in (("A", first), ("B", second)) if OURS not in found)
        return Verdict(case, None, math.inf, f"cannot say: not measured in {lacking}")
    shared = [label for label in first if label != OURS and label in second]
    ratio = seconds(second[OURS]) / seconds(first[OURS])
    noise = max(FLOOR, noise_of(first[OURS]) + noise_of(second[OURS]))
    if not shared:
        return Verdict(case, ratio, noise, "cannot say: nothing ran beside it in both")
    changes = [seconds(second[label]) / seconds(first[label]) for label in shared]
    drift = statistics.median(changes)
    measured = statistics.median(noise_of(first[label]) + noise_of(second[label]) for label in shared)
    ratio, noise = ratio / drift, noise + max(measured, statistics.median(abs(c / drift - 1) for c in changes))
    change = max(ratio, 1 / ratio) - 1
    if change > noise:
        return Verdict(case, ratio, noise, "faster" if ratio < 1 else "slower")
    return Verdict(case, ratio, noise, "equal within noise" if noise <= RESOLUTION else "cannot say: too noisy")


def by_case(record):
    """Measured entries by case and label."""
    found = {}
    for entry in record["entries"]:
        cases = found.setdefault(Entries.case(entry), {})
        if entry["outcome"] == "measured":
            cases[entry["label"]] = entry
    return found


def verdicts(first, second):
    """A verdict for each case that ummrm competes at in either record."""
    a, b = by_case(first), by_case(second)
    ours = [Entries.case(e) for record in (first, second) for e in record["entries"] if e["label"] == OURS]
    return [verdict(case, a.get(case, {}), b.get(case, {})) for case in dict.fromkeys(ours)]


def differences(first, second):
    """Lines that say what else differs between the runs."""
    pairs = [(name, first["about"].get(name), second["about"].get(name)) for name in (*SETTING, "commit")]
    versions = [record["about"]["versions"] for record in (first, second)]
    pairs += [(name, *(v.get(name) for v in versions)) for name in dict.fromkeys([*versions[0], *versions[1]])]
    return [f"{name}: {a} and {b}" for name, a, b in pairs if a != b]


def text(first, second):
    """The verdicts as a table, counted at the end."""
    found = verdicts(first, second)
    lines = differences(first, second)
    lines += ["", f"{'':84}{'B over A':>9}{'noise %':>9}  verdict on B"]
    for v in found:
        suite, direction, dtype, sizes = v.case
        s = dict(sizes)
        where = " ".join(f"{name.upper()}={s[name]}" for name in "thieks" if name in s) + f" {s.get('routing', '')}"
        ratio = "" if v.ratio is None else f"{v.ratio:.3f}"
        noise = "" if math.isinf(v.noise) else f"{100 * v.noise:.1f}"
        lines.append(f"{f'{suite} {direction} {dtype} [{where}]':84}{ratio:>9}{noise:>9}  {v.word}")
    counts = {}
    for v in found:
        counts[v.word.split(":")[0]] = counts.get(v.word.split(":")[0], 0) + 1
    words = ("faster", "slower", "equal within noise", "cannot say")
    lines += ["", ", ".join(f"{counts.get(word, 0)} {word}" for word in words)]
    return "\n".join(lines)


def find(name, results=RESULTS):
    """The records that `name` means: that of a file, or those in `results` of the commits that begin so.

    Raises:
        ValueError: there are none.
    """
    if Path(name).is_file():
        return [load(name)]
    found = []
    for path in sorted([*Path(results).glob("*.json"), *Path(results).glob("*/*.json")]):
        try:
            found.append(load(path))
        except ValueError:  # a GPU check that did not get as far as its benchmarks
            continue
    found = [record for record in found if record["about"]["commit"].startswith(name)]
    if not found or not name:
        raise ValueError(
            f"A and B must be files or commits with a record in {results}, got {name!r}; run `make bench`."
        )
    return found


def pair(a, b):
    """One record each of what the names mean, of the same setting.

    Raises:
        ValueError: no two share a setting, or several do.
    """

    def setting(record):
        return tuple(record["about"].get(name) for name in SETTING)

    firsts, seconds_ = find(a), find(b)
    if len(firsts) == len(seconds_) == 1:
        return firsts[0], seconds_[0]
    pairs = [(x, y) for x in firsts for y in seconds_ if setting(x) == setting(y)]
    if len(pairs) != 1:
        many = "; ".join(json.dumps(setting(x)) for x, _ in pairs) or "none"
        raise ValueError(f"A and B must have records of one and the same setting, got {many}; name the files instead.")
    return pairs[0]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("A", help="the older record")
    parser.add_argument("B", help="the newer record")
    options = parser.parse_args(arguments)
    try:
        first, second = pair(options.A, options.B)
    except ValueError as error:
        sys.exit(str(error))
    print(text(first, second))


if __name__ == "__main__":
    main()
