"""Finds CUTLASS's headers for the build, and prints the folder to include. Used by cutlass.cmake; the standard library
alone, so that any Python runs it.

Given a path, that is it: a folder that holds `include/cutlass` or `cutlass`, or the wheel below as a file. Given none,
pip downloads the wheel. A wheel's hash is checked, and its headers are unpacked beside their final place and renamed,
so that a half-unpacked folder is never used. What is wrong in a header is mended on the way (MENDS); a folder that was
given is used as it is.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "nvidia-cutlass==4.2.0.0"
SHA256 = "f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6"
OLDEST = (4, 2)
WITHIN_WHEEL = "cutlass_library/source/include"
NEEDED = ("cutlass", "cute")  # folders
MARKS = ("cutlass/version.h", "cute/tensor.hpp")  # files that tell an include folder
# Header: what is wrong in it, and what is right.
MENDS = {
    # An asm statement writes an operand that it declares as an input, a constant: the compiler may share its register.
    # Not fixed upstream (NVIDIA/cutlass#3458).
    "cute/arch/copy_sm90_desc.hpp": (
        """  uint64_t const smem_int64_desc = 0;
  asm volatile (
    "cvt.u64.u32 %0, %1;"
    :: "l"(smem_int64_desc), "r"(smem_int_desc));
""",
        """  uint64_t smem_int64_desc = 0;
  asm volatile (
    "cvt.u64.u32 %0, %1;"
    : "=l"(smem_int64_desc) : "r"(smem_int_desc));
""",
    ),
}
REMEDY = (
    "Give the build a copy by the environment variable UMMRM_CUTLASS or by -DUMMRM_CUTLASS= (a folder of CUTLASS 4.2 "
    f"or newer, or the wheel that `pip download --no-deps {PACKAGE}` brings), or build without tensor cores by "
    "UMMRM_TENSOR_CORES=0 or -DUMMRM_TENSOR_CORES=OFF."
)


class NotFound(Exception):
    """What was tried; the message gets the remedy appended."""


def check_version(include):
    text = (include / MARKS[0]).read_text(errors="replace")
    found = [re.search(rf"#define CUTLASS_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    version = tuple(int(match.group(1)) for match in found if match)
    if version < OLDEST:
        raise NotFound(f"{include} holds CUTLASS {'.'.join(map(str, version)) or 'of no version'}; 4.2 is needed.")


def from_folder(folder):
    candidates = [folder / "include", folder, folder / WITHIN_WHEEL]
    for include in candidates:
        if all((include / mark).is_file() for mark in MARKS):
            check_version(include)
            return include.resolve()
    tried = ", ".join(str(c) for c in candidates)
    raise NotFound(f"{folder} holds no CUTLASS: {' and '.join(MARKS)} are in none of {tried}.")


def check_hash(wheel):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise NotFound(f"{wheel} has the SHA-256 {digest}; that of {PACKAGE} is {SHA256}.")


def mended(inner, header):
    """The bytes of a header, `inner` its path."""
    if inner.as_posix() not in MENDS:
        return header
    wrong, right = (text.encode() for text in MENDS[inner.as_posix()])
    if header.count(wrong) != 1:
        raise NotFound(f"{inner} of the wheel is not what {PACKAGE} has: what is to be mended in it was not found.")
    return header.replace(wrong, right)


def unpack(wheel, target):
    """Unpacks the needed folders of a wheel to `target`, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".unpacking-", dir=target.parent) as scratch,
        zipfile.ZipFile(wheel) as archive,
    ):
        for entry in archive.infolist():
            path = PurePosixPath(entry.filename)
            if entry.is_dir() or ".." in path.parts or not path.is_relative_to(WITHIN_WHEEL):
                continue
            inner = path.relative_to(WITHIN_WHEEL)
            if inner.parts[0] in NEEDED:
                to = Path(scratch, "include", *inner.parts)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(mended(inner, archive.read(entry)))
        whole = Path(scratch, "include")
        missing = [mark for mark in MARKS if not (whole / mark).is_file()]
        if missing:
            raise NotFound(f"{wheel} lacks {', '.join(missing)} in {WITHIN_WHEEL}.")
        try:
            whole.rename(target)
        except OSError:  # another build was first
            if not target.is_dir():
                raise
    return target


def unpacked_folder(into):
    """Of another name when the mends change, so that headers unpacked before are not used."""
    contents = hashlib.sha256(f"{SHA256}{sorted(MENDS.items())}".encode()).hexdigest()
    return into / f"cutlass-{contents[:12]}"


def from_wheel(wheel, into):
    check_hash(wheel)
    return unpack(wheel, unpacked_folder(into))


def download(folder):
    """The wheel, brought by pip without its dependencies, which headers do not need."""
    # -I: the isolated environment in which pip builds packages hides pip itself, by way of PYTHONPATH
    pip = (sys.executable, "-I", "-m", "pip", "--disable-pip-version-check")
    command = [*pip, "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = "\n".join((done.stdout + done.stderr).strip().split("\n")[-6:])
        raise NotFound(f"`{' '.join(command)} {PACKAGE}` brought no wheel (exit status {done.returncode}):\n{said}\n")
    return wheels[0]


def find(into, given=None):
    """The folder to include.

    Args:
        into: build folder; headers of a wheel are unpacked there, once.
        given: what the user gave, or None.
    """
    if given is not None:
        given = Path(given).expanduser()
        if given.is_dir():
            return from_folder(given)
        if given.is_file():
            return from_wheel(given, into)
        raise NotFound(f"{given}, given for CUTLASS, does not exist.")
    unpacked = unpacked_folder(into)
    if unpacked.is_dir():
        return unpacked
    folder = Path(tempfile.mkdtemp(prefix="ummrm-cutlass-"))
    try:
        return from_wheel(download(folder), into)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--into", type=Path, required=True, help="build folder")
    parser.add_argument("--given", help="a folder with CUTLASS, or its wheel")
    arguments = parser.parse_args(argv)
    try:
        print(find(arguments.into.resolve(), arguments.given or None).as_posix())
    except NotFound as error:
        sys.exit(f"CUTLASS was not found. {error} {REMEDY}")


if __name__ == "__main__":
    main()
