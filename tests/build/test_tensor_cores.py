"""What stands around the tensor-core kernels: the reading of their machine code (tools/sass_check.py), the record of
what was compiled (tools/compiled.py), and the writing of their tile table from measurements (bench/tune.py). The
kernels themselves need a GPU; what is read of them here is the machine code that CMake left in build/cmake, if it did.
"""

import importlib.util
import re
import subprocess
import sys

import pytest
from checkout import ROOT

from bench import tune

USAGE = """
Resource usage:
 Common:
  GLOBAL:11
 Function product:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:2432 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function other:
  REG:90 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:2432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
Fatbin elf code:
================
arch = {arch}
code version = [1,8]

	code for {arch}
		Function : product
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
		Function : other
        /*0050*/                   {instruction} ;
"""


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for annotations, and another tool for this one
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sass_check():
    return tool("sass_check")


@pytest.fixture(scope="module")
def compiled(sass_check):
    return tool("compiled")


@pytest.fixture
def build(tmp_path):
    """A build folder with one object, and a cuobjdump that prints what `show` was given."""
    (tmp_path / "ummrm_sm90.dir").mkdir()
    (tmp_path / "ummrm_sm90.dir/forward.cu.o").write_bytes(b"")
    tool = tmp_path / "cuobjdump"

    def show(arch="sm_90a", instruction="HGMMA.64x128x16.F32 R24, gdesc[UR8]", stack=0):
        (tmp_path / "usage").write_text(USAGE.format(stack=stack))
        (tmp_path / "sass").write_text(SASS.format(arch=arch, instruction=instruction))
        tool.write_text(f'#!/bin/sh\ncase $1 in -sass) cat "{tmp_path}/sass";; *) cat "{tmp_path}/usage";; esac\n')
        tool.chmod(0o755)
        return tmp_path, tool

    return show


def test_sass_check_counts(sass_check, build):
    kernels = sass_check.check(*build())
    assert [(k.name, k.arch, k.registers, k.tensor_core, k.local) for k in kernels] == [
        ("product", "sm_90a", 168, 2, 0),
        ("other", "sm_90a", 90, 1, 0),
    ]


@pytest.mark.parametrize(
    "shown, fault",
    [
        ({"instruction": "FFMA R1, R2, R3, R4"}, "other has no HGMMA"),
        ({"instruction": "HMMA.16816.F32 R4, R8, R12, R4"}, "other has no HGMMA"),
        ({"instruction": "STL [R1+0x8], R4"}, "1 accesses"),
        ({"stack": 24}, "24 bytes of stack"),
        ({"arch": "sm_90"}, "holds no kernel for sm_90a"),
    ],
)
def test_sass_check_names_what_is_wrong(sass_check, build, shown, fault):
    with pytest.raises(AssertionError, match=fault):
        sass_check.check(*build(**shown))


def test_the_machine_code_that_was_built(sass_check, compiled):
    """Of `make test-cpp`, which runs first: Ampere's is there, and Hopper's too, or its sources are those on record."""
    try:
        kernels = [(k.file, k.arch) for k in sass_check.check(ROOT / "build/cmake")]
    except (FileNotFoundError, sass_check.NoTool) as reason:
        pytest.skip(str(reason))
    if (record := compiled.recorded()) is not None:
        kernels += [(k["file"], record["arch"]) for k in record["kernels"]]
    assert set(kernels) >= {
        (f"{path.name}.o", arch)
        for folder, arch in (("sm80", "sm_80"), ("sm90", "sm_90a"))
        for path in (ROOT / "kernels/cuda" / folder).glob("*.cu")
    }


def test_what_changed_is_compiled_again(compiled, sass_check, tmp_path, monkeypatch):
    copied = [path.relative_to(ROOT) for path in compiled.sources()]
    names = {path.name for path in copied}
    assert {"forward.cu", "grouped_gemm.cuh", "grouped_product.h", "expert_gemm.h", "CMakeLists.txt"} <= names
    for path in copied:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "tools").mkdir(exist_ok=True)
    files = [f"{path.name}.o" for path in (ROOT / "kernels/cuda/sm90").glob("*.cu")]
    kernels = [sass_check.Kernel(file, "sm_90a", "kernel", 168, 0, 8, 0) for file in files]
    monkeypatch.setattr(compiled.sass_check, "check", lambda build: kernels)
    assert compiled.recorded(tmp_path) is None
    compiled.write("build", tmp_path)
    assert len(compiled.recorded(tmp_path)["kernels"]) == len(files)
    with (tmp_path / "kernels/cuda/grouped_product.h").open("a") as header:
        header.write("// another line\n\n")
    assert compiled.recorded(tmp_path) is not None  # a comment is compiled to nothing
    with (tmp_path / "kernels/cuda/grouped_product.h").open("a") as header:
        header.write("static_assert(true);  // another line\n")
    assert compiled.recorded(tmp_path) is None
    del kernels[0]
    with pytest.raises(AssertionError, match=f"holds no kernels for sm_90a of {files[0]}"):
        compiled.write("build", tmp_path)


def test_sass_check_says_where_it_looked(sass_check, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="build with CUTLASS first"):
        sass_check.check(tmp_path, tmp_path / "cuobjdump")
    monkeypatch.setattr(sass_check.shutil, "which", lambda _: None)
    monkeypatch.setattr(sass_check.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sass_check.Path, "is_file", lambda _: False)
    monkeypatch.setenv("CUDA_HOME", "/opt/somewhere")
    with pytest.raises(sass_check.NoTool, match="/opt/somewhere/bin/cuobjdump"):
        sass_check.find_cuobjdump()


OUTPUT = """device 90 132 NVIDIA H200
forward 5632 1024 3000 0 5632 1.00
forward 5632 1024 3000 1 5632 0.99
forward 5632 1024 3000 1 2048 0.80
forward 5632 1024 2500 0 5632 1.00
forward 5632 1024 2500 1 5632 0.90
forward 5632 1024 2500 1 2048 1.90
weight_grad 1024 5632 3000 0 1024 2.00
weight_grad 1024 5632 3000 1 1024 1.99
"""


def test_tune_keeps_the_fastest_of_all_rows_that_share_a_key():
    device, timings = tune.parse(OUTPUT)
    assert device == (90, 132, "NVIDIA H200") and len(timings) == 8
    assert tune.fastest(timings) == {
        ("forward", 5632, 1024, 11): (1, 5632),  # the best of 3000 rows alone is poor for 2500
        ("weight_grad", 1024, 5632, 11): (0, 1024),  # a lead within noise changes nothing
    }
    with pytest.raises(ValueError, match="should name the device"):
        tune.parse("forward 1 1 1 1 1 1")


def test_tune_says_what_fused_products_take_over_what_they_replace():
    text = (ROOT / "kernels/cuda/expert_tiles.h").read_text()
    (names,) = re.findall(r"enum class Fusion : int8_t { (.+) };", text)
    assert tuple(names.split(", ")) == tune.FUSED
    output = OUTPUT + "glu 64 16 32 0 64 2.0\nglu 64 16 32 1 64 3.0\nglu_apart 64 16 32 2 64 3.0\nglu 64 16 9 0 64 1\n"
    _, timings = tune.parse(output)
    assert tune.fusion_lines(timings) == ["glu 64 x 16, 32 rows a group: 2.000 ms, apart 3.000 ms: 1.50"]


def test_tune_replaces_rows_of_its_own_gpu_alone():
    first = tune.table(tune.TABLE.read_text(), (80, 108, "NVIDIA A100"), {("forward", 64, 128, 5): (0, 64)})
    again = tune.table(first, (90, 132, "NVIDIA H200"), {("input_grad", 8, 16, 2): (1, 8)})
    last = tune.table(again, (80, 108, "NVIDIA A100"), {("forward", 64, 128, 5): (1, 64)})
    assert "{80, 108, ExpertProduct::forward, 64, 128, 5, 0, 64},\n" in first and tune.NOTHING not in first
    assert sorted(line for line in last.split("\n") if line.startswith("{")) == [
        "{80, 108, ExpertProduct::forward, 64, 128, 5, 1, 64},",
        "{90, 132, ExpertProduct::input_grad, 8, 16, 2, 1, 8},",
    ]
    assert tune.table("", (90, 132, "x"), {}) == tune.HEAD + tune.NOTHING


def test_the_table_has_the_form_that_tune_writes():
    text = tune.TABLE.read_text()
    assert text.startswith(tune.HEAD)
    assert all(line.startswith(("//", "{")) or not line for line in text.split("\n"))


def test_tune_measures_every_product_of_every_layer():
    lines = tune.sizes(layers=((16, 32, 4, 2),), tokens=(8,))
    assert len(lines) == 10 and len(set(lines)) == 10
    assert {line.split()[0] for line in lines} == {"forward", "input_grad", "weight_grad", *tune.FUSED}
    assert lines[0] == "forward 8 1 4 16 64 16" and lines[4] == "weight_grad 8 1 4 16 16 64"


def test_tune_without_a_program_or_a_gpu_changes_nothing(tmp_path):
    def run():
        command = [sys.executable, "-m", "bench.tune", "--build", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    before, done = tune.TABLE.read_bytes(), run()
    assert done.returncode != 0 and "does not exist" in done.stderr
    program = tmp_path / "ummrm_tune"
    program.write_text(f"#!/bin/sh\necho 'there is no GPU to measure on' >&2\nexit {tune.NO_DEVICE}\n")
    program.chmod(0o755)
    done = run()
    assert done.returncode != 0 and "there is no GPU to measure on" in done.stderr
    assert tune.TABLE.read_bytes() == before
