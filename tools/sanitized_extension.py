"""Builds the whole extension, csrc/ and kernels/cpu/, under ASan and UBSan into build/sanitized, beside a copy of the
package, and runs the operators' tests on it; any report fails. (CMake's UMMRM_SANITIZE builds kernels/ alone, whose
tests know no torch.)

    python tools/sanitized_extension.py [what pytest is to run, by default the operators' tests]

torch is not instrumented: what it writes out of bounds is not seen, what we do in its memory is. Signed overflow is
looked for too, which `-fwrapv`, a habit of Python's own flags, would hide. Leaks are not: the interpreter has its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILE = ["-O1", "-g1", "-std=c++20", "-w", "-fvisibility=hidden", "-fno-wrapv", "-fno-omit-frame-pointer"]
# torch calls functions through pointers of another type, in its headers too
IGNORED = ["-fno-sanitize=vptr,function" if "clang" in os.environ.get("CXX", "") else "-fno-sanitize=vptr"]
STEMS = ("routing", "permute", "expert_gemm", "activation", "merge_experts", "moe_ffn", "merged_ffn")
OPERATORS = (*STEMS, "host_layer", "grouped", "checks", "zero_sizes", "fuzz")
# What code generation or the number of threads decides is not what is looked for, and takes most of the time.
LEFT_OUT = "not test_compiled and not opcheck and not deterministic and not gradcheck"


def build():
    """Compiles what has changed, and puts the Python files of today beside it."""
    import torch
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(p) for folder in ("csrc", "kernels/cpu") for p in (ROOT / folder).glob("*.cpp"))
    flags = [*COMPILE, *SANITIZE, *IGNORED, "-DUMMRM_NO_CLONES"]  # see kernels/cpu/dispatch.h
    include = [str(ROOT / "kernels/include")]
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))  # torch's own pool, as setup.py has it
    link = [*SANITIZE, str(openmp[0]) if openmp else "-fopenmp"]
    extension = CppExtension(
        "ummrm._C", sources, include_dirs=include, extra_compile_args=[*flags, "-fopenmp"], extra_link_args=link
    )
    command = BuildExtension(Distribution({"name": "ummrm", "ext_modules": [extension]}))
    command.build_lib, command.build_temp, command.force = str(BUILD / "site"), str(BUILD / "temp"), True
    command.ensure_finalized()
    package = BUILD / "site" / "ummrm"
    shutil.rmtree(package, ignore_errors=True)
    command.run()
    ignored = shutil.ignore_patterns("_C*", "_build_record.json", "__pycache__")
    shutil.copytree(ROOT / "ummrm", package, ignore=ignored, dirs_exist_ok=True)
    record = {"torch_version": torch.__version__, "no_cuda_kernels": "it was built for the sanitizers"}
    (package / "_build_record.json").write_text(json.dumps(record))


def runtime(name):
    """The compiler's own copy of a library, which is preloaded: the interpreter is not instrumented."""
    found = subprocess.run(
        [os.environ.get("CXX", "c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return os.path.realpath(found.stdout.strip())


def main(arguments):
    build()
    # libstdc++ is preloaded after libasan, which looks for its __cxa_throw when it starts
    environment = {
        **os.environ,
        "PYTHONPATH": str(BUILD / "site"),
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    check = (
        f"import ummrm.ops.library as l; assert l._C.__file__.startswith({str(BUILD)!r}), l._C.__file__; "
        "assert 'libasan' in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-P", "-c", check], cwd=ROOT, env=environment, check=True)
    tests = [str(ROOT / "tests" / "ops" / f"test_{stem}.py") for stem in OPERATORS]
    chosen = arguments or [*tests, "--backend=compiled", "-k", LEFT_OUT]
    # --capture=sys: a report goes to the process's own error stream, which pytest would take down with it
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", *chosen]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
