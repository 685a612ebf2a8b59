"""Which kernels the fast tier has to compile for which architectures. Hopper's tensor-core kernels take nvcc six
minutes of a core, more than the fast tier has to spare. So the full tier, which compiles them always, writes down of
which sources it did and what came out, and the fast tier compiles them where these sources have changed since.

    python tools/compiled.py                   the architectures, as CMake takes them
    python tools/compiled.py --write BUILD     after a build of today's sources in BUILD
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import sass_check

ROOT = Path(__file__).resolve().parent.parent
RECORD = "tools/compiled.json"
ALWAYS, ON_CHANGE = "80-real", "90a-real"
ARCH, FOLDER = "sm_90a", "kernels/cuda/sm90"
HOW = ("CMakeLists.txt", "tools/architectures.cmake", "third_party/cutlass.cmake", "third_party/cutlass.py")


def sources(root=ROOT):
    """The kernels' files, every header of ours that they include, and what decides how they are compiled."""
    found, left = set(), sorted((root / FOLDER).glob("*.cu"))
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            folders = (path.parent, root / "kernels/cuda", root / "kernels/include")
            left += [(folder / name).resolve() for folder in folders if (folder / name).is_file()][:1]
    return sorted([*found, *(root / name for name in HOW)])


def what_is_compiled(path):
    """A file's text; of a kernel's file without comments and empty lines, which make no other machine code."""
    text = path.read_text()
    if path.name in {Path(name).name for name in HOW}:
        return text
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def digest(root=ROOT):
    """sha256 over names and contents of `sources`, comments aside."""
    total = hashlib.sha256()
    for path in sources(root):
        content = what_is_compiled(path).encode()
        total.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def recorded(root=ROOT):
    """The record, if it is of today's sources; else None."""
    path = root / RECORD
    record = json.loads(path.read_text()) if path.is_file() else {}
    return record if record.get("digest") == digest(root) else None


def write(build, root=ROOT):
    """Records a build, once `sass_check` finds nothing wrong with it.

    Raises:
        AssertionError: it does, or `build` lacks one of the kernels' files.
        FileNotFoundError, NoTool: as `sass_check.check` does.
    """
    kernels = [kernel for kernel in sass_check.check(build) if kernel.arch == ARCH]
    missing = {f"{path.name}.o" for path in (root / FOLDER).glob("*.cu")} - {kernel.file for kernel in kernels}
    assert not missing, f"{build} holds no kernels for {ARCH} of {', '.join(sorted(missing))}"
    rows = [{"file": k.file, "registers": k.registers, "tensor_core": k.tensor_core} for k in kernels]
    record = {"digest": digest(root), "arch": ARCH, "kernels": rows}
    (root / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="BUILD", help="CMake's build folder")
    build = parser.parse_args().write
    if build is not None:
        try:
            write(build)
        except (sass_check.NoTool, FileNotFoundError, AssertionError) as error:
            sys.exit(str(error))
        return
    record = recorded()
    if record is None:
        print(f"{FOLDER} has changed since {RECORD} was written: compiled here", file=sys.stderr)
    else:
        print(f"{FOLDER}: {len(record['kernels'])} kernels, as {RECORD} has them; not compiled here", file=sys.stderr)
    print(ALWAYS if record else f"{ALWAYS};{ON_CHANGE}")


if __name__ == "__main__":
    main()
