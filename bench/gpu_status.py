"""Says whether today's sources are the ones that a GPU last checked: one line a stage, for every GPU with records.

    python -m bench.gpu_status [--results folder]

Exit status 0 if on some GPU every stage passed with today's sources, else 1. Needs neither torch nor a GPU.
"""

import argparse
import sys
from pathlib import Path

from . import gpu_record


def status(results=gpu_record.RESULTS, root=gpu_record.ROOT):
    """(whether some GPU passed every stage with the sources below `root`, lines that say so)."""
    sources, by_device = gpu_record.source_hash(root), {}
    for record, path in gpu_record.records(results):
        by_device.setdefault(record["device"], []).append((record, path))
    good, lines = False, []
    for device, found in by_device.items():
        lines.append(device)
        stages = [(name, *gpu_record.stage_status(found, name, sources)) for name in gpu_record.STAGES]
        lines += [f"  {name:9} {line}" for name, _, line in stages]
        good = good or all(passed for _, passed, _ in stages)
    if not by_device:
        lines = [f"{name:9} never checked on a GPU" for name in gpu_record.STAGES]
    return good, lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=gpu_record.RESULTS)
    good, lines = status(parser.parse_args(arguments).results)
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
