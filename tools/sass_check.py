"""Reads the machine code of the tensor-core kernels that CMake built, and fails unless every one of them uses its
architecture's tensor-core instruction and keeps its values in registers.

ptxas refuses spills already (CMakeLists.txt); this looks at what came out, instances that were compiled for the wrong
architecture included, which CUTLASS turns into kernels that only report an error. Needs cuobjdump, of the CUDA toolkit
or of the Triton package.

    python tools/sass_check.py build/cmake
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = {"sm_90a": "HGMMA", "sm_80": "HMMA"}
FOLDERS = {"ummrm_sm90": "sm_90a", "ummrm_sm80": "sm_80"}
MAX_REGISTERS = 255


class NoTool(Exception):
    """Where cuobjdump was looked for."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code: where it is from, registers a thread at its start, bytes of stack, and how many
    tensor-core instructions and accesses to local memory it has."""

    file: str
    arch: str
    name: str
    registers: int
    stack: int
    tensor_core: int
    local: int

    def faults(self):
        if self.arch not in INSTRUCTION:
            yield f"is code for {self.arch}"
        elif self.tensor_core == 0:
            yield f"has no {INSTRUCTION[self.arch]}"
        if self.stack or self.local:
            yield f"keeps values in local memory ({self.stack} bytes of stack, {self.local} accesses)"
        if self.registers > MAX_REGISTERS:
            yield f"takes {self.registers} registers"


def find_cuobjdump():
    """cuobjdump from PATH, a CUDA toolkit, or the Triton package that this Python can import."""
    found = shutil.which("cuobjdump")
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    toolkits += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    candidates = [Path(found)] if found else [toolkit / "bin/cuobjdump" for toolkit in toolkits]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise NoTool(f"there is no cuobjdump on PATH, nor {', '.join(map(str, candidates)) or 'a CUDA toolkit'}")


def objects(build):
    """(object file, architecture it must be for) of every tensor-core source that was built."""
    found = [
        (path, arch) for folder, arch in FOLDERS.items() for path in sorted(Path(build).rglob(f"{folder}.dir/**/*.o"))
    ]
    if not found:
        raise FileNotFoundError(f"{build} holds no objects of {' or '.join(FOLDERS)}: build with CUTLASS first")
    return found


def parse(file, usage, sass):
    """The kernels of one object, from the text of `cuobjdump -res-usage` and `cuobjdump -sass`."""
    registers = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        fields = dict(re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", numbers))
        registers[name] = (int(fields["REG"]), int(fields["STACK"]) + int(fields.get("LOCAL", 0)))
    arch, kernels = "", []
    for part in re.split(r"(?m)^\s*(?=arch = |Function : )", sass):
        if part.startswith("arch = "):
            arch = part.split()[2]
        if part.startswith("Function : "):
            name = part.split()[2]
            wanted = INSTRUCTION.get(arch, "nothing")
            count, local = len(re.findall(rf"\b{wanted}\b", part)), len(re.findall(r"\b(?:LDL|STL)\b", part))
            kernels.append(Kernel(file, arch, name, *registers[name], count, local))
    return kernels


def check(build, cuobjdump=None):
    """All tensor-core kernels under a build folder.

    Raises:
        NoTool: there is no cuobjdump.
        FileNotFoundError: nothing was built.
        AssertionError: a kernel lacks tensor-core instructions or spills; the message names each.
    """
    cuobjdump, kernels, faults = cuobjdump or find_cuobjdump(), [], []
    for path, arch in objects(build):
        usage, sass = (
            subprocess.run([str(cuobjdump), flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
        here = parse(path.name, usage, sass)
        if not any(kernel.arch == arch for kernel in here):
            faults.append(f"{path.name} holds no kernel for {arch}")
        kernels += here
    faults += [f"{k.file}: {k.name[:80]} {fault}" for k in kernels for fault in k.faults()]
    assert not faults, "\n".join(faults)
    return kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path, help="CMake's build folder")
    try:
        kernels = check(parser.parse_args().build)
    except (NoTool, FileNotFoundError, AssertionError) as error:
        sys.exit(str(error))
    print(f"{'file':<24}{'arch':<8}{'registers':>10}{'tensor-core instructions':>26}")
    for kernel in kernels:
        print(f"{kernel.file:<24}{kernel.arch:<8}{kernel.registers:>10}{kernel.tensor_core:>26}")
    print(f"{len(kernels)} kernels, none with values in local memory")


if __name__ == "__main__":
    main()
