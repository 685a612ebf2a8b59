"""The house rules, read off the real imports and includes: who may know whom, one stem an operator, no long files."""

import ast
import re
import subprocess
import sys

import pytest
from checkout import ROOT

STEMS = ("routing", "permute", "expert_gemm", "activation", "merge_experts")
COMPOSED = ("moe_ffn", "merged_ffn")  # compositions of the operators above; Triton has its own of the first
MAX_LINES = 450

# Who may know whom: each room of the package (and each module at its top) may import the ones named here and itself.
ALLOWED = {
    "version": set(),
    "config": set(),
    "memory": set(),
    "files": set(),
    "ops": {"_C"},
    "nn": {"config", "ops"},
    "hf": {"config", "files", "nn", "ops", "version"},
    "upcycle": {"config", "hf", "nn"},
    "merge": {"config", "hf", "nn", "upcycle"},
    "trainer": {"config", "files", "hf", "merge", "nn"},
    "data": set(),
    "evaluation": {"data", "files", "hf"},
    "pipeline": {"config", "data", "evaluation", "files", "hf", "merge", "nn", "trainer", "upcycle", "version"},
    "cli": {"__init__", "config", "data", "evaluation", "files", "hf", "memory", "merge", "ops", "pipeline", "upcycle"},
    "__main__": {"cli"},
}
# What a room may import from outside. The core needs torch and transformers alone; the rest are extras.
OUTSIDE = {
    "version": set(),
    "config": set(),
    "memory": set(),
    "files": set(),
    "ops": {"torch", "triton"},
    "nn": {"torch"},
    # the next two come with transformers; what has partitioned a model is there
    "hf": {"torch", "transformers", "huggingface_hub", "safetensors", "deepspeed"},
    "upcycle": {"torch", "transformers"},
    "merge": {"torch", "transformers"},
    "trainer": {"torch", "trl", "datasets"},
    "data": {"datasets", "pyarrow"},
    "evaluation": {"torch", "transformers", "numpy", "scipy", "matplotlib", "jinja2"},
    "pipeline": {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "rich", "yaml"},
    "cli": {
        "datasets",
        "torch",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "typer",
        "rich",
        "yaml",
        "matplotlib",
    },
    "__main__": set(),
}


def owner(path):
    """The room or top module that a file of the package belongs to."""
    parts = path.relative_to(ROOT / "ummrm").parts
    return parts[0] if len(parts) > 1 else path.stem


def package_files():
    return sorted((ROOT / "ummrm").rglob("*.py"))


def imports(path):
    """(level, module, name) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.level, node.module or "", alias.name


def own_imports(path):
    """Names of the package's rooms and top modules that a file imports, its own room left out."""
    depth = len(path.relative_to(ROOT / "ummrm").parts)
    for level, module, name in imports(path):
        if level == depth:  # relative to the package itself
            target = module.split(".")[0] if module else name
            known = target == "_C" or any((ROOT / "ummrm" / t).exists() for t in (f"{target}.py", target))
            # `from .. import merge` in a command is the function, which the package's front hands out
            yield target if known and not (owner(path) == "cli" and not module) else "__init__"
        elif level == 0 and module.split(".")[0] == "ummrm":
            yield (module.split(".") + [name])[1] or "__init__"


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_it_may(path):
    outside = {module.split(".")[0] for level, module, _ in imports(path) if level == 0} - {"ummrm"}
    assert "lab" not in outside, "the product does not know its laboratory"
    if path == ROOT / "ummrm" / "__init__.py":
        assert "cli" not in own_imports(path)
        return
    room = owner(path)
    assert room in ALLOWED, f"{path.name} is new: give it a row in ALLOWED, and its place in the design"
    assert set(own_imports(path)) - {room} <= ALLOWED[room]
    numpy = {"numpy"} if path.name == "interpreter.py" else set()  # what Triton's interpreter computes with
    assert outside - sys.stdlib_module_names <= OUTSIDE[room] | numpy


def test_only_the_library_loads_the_extension_and_only_backends_load_triton():
    users = {path.relative_to(ROOT).as_posix() for path in package_files() if "_C" in own_imports(path)}
    assert users == {"ummrm/ops/library.py"}
    for path in package_files():
        if path.parent.name == "triton_kernels":
            continue
        triton = "triton" in {module.split(".")[0] for level, module, _ in imports(path) if level == 0}
        assert (triton or "triton_kernels" in path.read_text()) == (path.name == "backends.py"), path.name
    others = [p for folder in ("bench", "lab", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert [p.name for p in others if re.search(r"^\s*(from|import)\s.*\b_C\b", p.read_text(), re.M)] == []


def test_triton_kernels_know_torch_triton_and_each_other_alone():
    files = sorted((ROOT / "ummrm/ops/triton_kernels").glob("*.py"))
    assert {f"{stem}.py" for stem in STEMS} < {path.name for path in files}
    for path in files:
        assert {level for level, _, _ in imports(path)} <= {0, 1}, path.name


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"][^">]+[">])', path.read_text(), re.M)


def cpp_files(folder):
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def test_kernels_know_neither_torch_nor_the_extension():
    files = cpp_files("kernels")
    assert len(files) > 8
    for path in files:
        for include in includes(path):
            name = include[1:-1]
            if include[0] == '"':
                local = (path.parent / name).is_file() or (ROOT / "kernels/include" / name).is_file()
                assert local, f"{path.relative_to(ROOT)} includes {include}, which is not in kernels/"
            else:
                assert "/" not in name or name.split("/")[0] in {"cute", "cutlass", "cuda", "sys"}, (path, include)
                assert not re.match(r"(torch|ATen|c10|pybind11|Python)", name), (path, include)


def test_the_extension_knows_kernels_by_their_headers_and_torch():
    for path in cpp_files("csrc"):
        for include in includes(path):
            name = include[1:-1]
            if include[0] == '"':
                ok = (ROOT / "csrc" / name).is_file() or (
                    name.startswith("ummrm/") and (ROOT / "kernels/include" / name).is_file()
                )
                assert ok, f"{path.name} includes {include}"
            else:
                assert name != "torch/extension.h", f"{path.name}: 22 s a file against 7 for torch/library.h"
                assert "/" not in name or name.split("/")[0] in {"torch", "ATen", "c10", "pybind11", "sys"}, (
                    path,
                    include,
                )


def test_one_switch_for_cuda_in_one_header():
    guarded = [p for p in cpp_files("csrc") if re.search(r"#\s*if.*UMMRM_(WITH_)?CUDA", p.read_text())]
    assert len(guarded) <= 1 and all(p.suffix == ".h" for p in guarded)


@pytest.mark.parametrize("stem", STEMS + COMPOSED)
def test_one_stem_an_operator_everywhere(stem):
    benchmark = stem if stem in STEMS else "layer"
    places = [f"csrc/{stem}.cpp", f"tests/ops/test_{stem}.py", f"bench/bench_{benchmark}.py"]
    if stem in STEMS:
        places += [f"kernels/include/ummrm/{stem}.h", f"kernels/cpu/{stem}.cpp", f"tests/cpp/test_{stem}.cpp"]
        places += [f"ummrm/ops/triton_kernels/{stem}.py"]
        places += [f"kernels/cuda/{stem}.cu", f"tests/emulator/test_{stem}.cpp"]
    missing = [place for place in places if not (ROOT / place).is_file()]
    assert not missing
    entry = {"routing": "route"}.get(stem, stem)
    for module in ("__init__", "reference" if stem in STEMS else "composed_reference"):
        tree = ast.parse((ROOT / "ummrm/ops" / f"{module}.py").read_text())
        assert entry in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_schema_has_a_fake_and_a_documented_function_or_is_internal():
    schemas = set(re.findall(r'"(\w+)\((?:Tensor|" \+)', (ROOT / "csrc/module.cpp").read_text()))
    schemas |= set(re.findall(r'define\(m, "(\w+)\(', (ROOT / "csrc/module.cpp").read_text()))
    files = ("ummrm/ops/fakes.py", "ummrm/ops/composed_fakes.py")
    fakes = {name for f in files for name in re.findall(r"@fake\ndef _(\w+)\(", (ROOT / f).read_text())}
    assert len(schemas) > 15 and fakes == schemas


def tracked(*suffixes):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [ROOT / name for name in listed if name.endswith(suffixes) and (ROOT / name).is_file()]


def test_no_file_is_long():
    long = {
        p.name: n
        for p in tracked(".py", ".cpp", ".h", ".cu", ".cuh")
        if (n := len(p.read_text().split("\n"))) > MAX_LINES
    }
    assert long == {}


def test_every_file_opens_with_its_purpose():
    for path in tracked(".py"):
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no opening paragraph"
    for path in tracked(".cpp", ".h", ".cu", ".cuh"):
        assert path.read_text().startswith(("//", "/*")), f"{path.relative_to(ROOT)} has no opening paragraph"


def test_no_switch_is_read_from_the_environment_at_run_time():
    for path in package_files():
        reads = re.findall(r"os\.environ(?:\.get\(|\[)|os\.getenv\(", path.read_text())
        assert not reads, path.name
    for path in cpp_files("csrc") + cpp_files("kernels"):
        assert "getenv" not in path.read_text(), path.name


def test_importing_the_core_needs_no_extra():
    script = (
        "import sys\n"
        "for name in ('matplotlib', 'trl', 'peft', 'datasets', 'triton'): sys.modules[name] = None\n"
        "import ummrm\n"
        "assert 'lab.demo' not in sys.modules and 'ummrm.cli' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
