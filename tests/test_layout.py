"""The house rules, read off the real imports and includes: who may know whom, one stem an operator, no long files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEMS = ("routing", "permute", "expert_gemm", "activation", "merge_experts")
COMPOSED = ("moe_ffn", "merged_ffn")  # compositions of the operators above; Triton has its own of the first
MAX_LINES = 450

# Each module of the package may import the modules named here and nothing else of the package. Nothing imports cli.
ALLOWED = {
    "reference": set(),
    "_autograd": {"reference"},
    "_library": {"_autograd", "reference", "_C"},
    "backends": {"_library", "reference", "triton_kernels"},
    "ops": {"backends", "reference"},
    "config": set(),
    "dense": set(),
    "parallel": set(),
    "card": set(),
    "saving": {"card"},
    "router": {"ops", "config"},
    "experts_interface": {"ops", "reference"},
    "normalization": set(),
    "probe": {"dense"},
    "layers": {"ops", "config", "dense", "probe", "router"},
    "families": {"dense"},
    "legacy": {"families"},
    "losses": {"layers", "parallel", "router"},
    "usage": {"layers", "router"},
    "modeling": {"config", "families", "layers", "legacy", "losses", "router", "saving"},
    "detect": {"dense", "families", "modeling", "probe"},
    "upcycle": {"config", "dense", "detect", "families", "layers", "modeling", "probe"},
    "merge": {"card", "config", "layers", "modeling", "saving", "upcycle", "usage"},
    "trainer": {"card", "config", "layers", "losses", "merge", "normalization", "usage"},
    "tasks": set(),
    "recipe": {"config", "dense", "layers", "losses", "merge", "plots", "tasks", "upcycle", "usage"},
    "plots": {"recipe"},
    "lab": {"config", "layers", "losses", "merge", "ops", "plots", "recipe", "tasks", "upcycle", "usage"},
    "cli": {"__init__", "_library", "lab", "merge", "modeling", "recipe", "upcycle"},
    "__main__": {"cli"},
}
# What the package may import from outside. The core needs torch and transformers alone; the rest are extras.
CORE = {"torch", "transformers"}
EXTRAS = {
    "trainer": {"trl", "datasets"},
    "backends": {"triton"},
    "recipe": {"rich", "yaml", "safetensors"},
    "plots": {"matplotlib", "numpy"},
    "lab": {"rich", "matplotlib", "numpy", "trl", "datasets"},
    "cli": {"typer", "rich", "yaml"},
    "tasks": set(),
}


def owner(path):
    """The module (a subpackage counts as one) that a file of the package belongs to."""
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
    """Names of the package's modules that a file imports, its own subpackage left out."""
    depth = len(path.relative_to(ROOT / "ummrm").parts)
    for level, module, name in imports(path):
        if level == depth:  # relative to the package itself
            target = module.split(".")[0] if module else name
            known = target == "_C" or any((ROOT / "ummrm" / t).exists() for t in (f"{target}.py", target))
            yield target if known else "__init__"
        elif level == 0 and module.split(".")[0] == "ummrm":
            yield (module.split(".") + [name])[1] or "__init__"


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_it_may(path):
    if path == ROOT / "ummrm" / "__init__.py":
        assert "cli" not in own_imports(path)
        return
    module = owner(path)
    assert module in ALLOWED, f"{path.name} is new: give it a row in ALLOWED, and its place in the design"
    assert set(own_imports(path)) <= ALLOWED[module]
    outside = {module.split(".")[0] for level, module, _ in imports(path) if level == 0} - {"ummrm"}
    assert outside - sys.stdlib_module_names <= CORE | EXTRAS.get(module, set())


def test_only_the_library_loads_the_extension_and_only_backends_load_triton():
    users = {owner(path) for path in package_files() if "_C" in own_imports(path)}
    assert users == {"_library"}
    for path in package_files():
        triton = "triton" in {module.split(".")[0] for level, module, _ in imports(path) if level == 0}
        assert (triton or "triton_kernels" in path.read_text()) == (path.name == "backends.py"), path.name
    others = [p for folder in ("bench", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert [p.name for p in others if re.search(r"^\s*(from|import)\s.*\b_C\b", p.read_text(), re.M)] == []


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


def test_triton_kernels_know_torch_and_triton_alone():
    """And each other, by relative imports: they are installed as a part of the package whose name they do not use."""
    files = sorted((ROOT / "kernels/triton").glob("*.py"))
    assert {f"{stem}.py" for stem in STEMS} < {path.name for path in files}
    for path in files:
        outside = {module.split(".")[0] for level, module, _ in imports(path) if level == 0}
        allowed = {"torch", "triton"} | ({"numpy"} if path.name == "interpreter.py" else set())
        assert outside - sys.stdlib_module_names <= allowed, path.name
        assert {level for level, _, _ in imports(path)} <= {0, 1}, path.name


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
                assert "/" not in name or name.split("/")[0] in {"torch", "ATen", "c10", "pybind11"}, (path, include)


def test_one_switch_for_cuda_in_one_header():
    guarded = [p for p in cpp_files("csrc") if re.search(r"#\s*if.*UMMRM_(WITH_)?CUDA", p.read_text())]
    assert len(guarded) <= 1 and all(p.suffix == ".h" for p in guarded)


@pytest.mark.parametrize("stem", STEMS + COMPOSED)
def test_one_stem_an_operator_everywhere(stem):
    benchmark = stem if stem in STEMS else "layer"
    places = [f"csrc/{stem}.cpp", f"tests/test_{stem}.py", f"bench/bench_{benchmark}.py"]
    if stem in STEMS:
        places += [f"kernels/include/ummrm/{stem}.h", f"kernels/cpu/{stem}.cpp", f"tests/cpp/test_{stem}.cpp"]
        places += [f"kernels/triton/{stem}.py"]
        places += [f"kernels/cuda/{stem}.cu", f"tests/emulator/test_{stem}.cpp"]
    missing = [place for place in places if not (ROOT / place).is_file()]
    assert not missing
    entry = {"routing": "route"}.get(stem, stem)
    for module in ("ops", "reference"):
        tree = ast.parse((ROOT / "ummrm" / f"{module}.py").read_text())
        assert entry in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_schema_has_a_fake_and_a_documented_function_or_is_internal():
    schemas = set(re.findall(r'"(\w+)\((?:Tensor|" \+)', (ROOT / "csrc/module.cpp").read_text()))
    schemas |= set(re.findall(r'define\(m, "(\w+)\(', (ROOT / "csrc/module.cpp").read_text()))
    fakes = set(re.findall(r"@_fake\ndef _(\w+)\(", (ROOT / "ummrm/_library.py").read_text()))
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
    for path in [*package_files(), *(ROOT / "kernels/triton").glob("*.py")]:
        reads = re.findall(r"os\.environ(?:\.get\(|\[)|os\.getenv\(", path.read_text())
        assert not reads or "recipe" in path.parts, path.name  # recipe passes the environment on to a child process
    for path in cpp_files("csrc") + cpp_files("kernels"):
        assert "getenv" not in path.read_text(), path.name


def test_importing_the_core_needs_no_extra():
    script = (
        "import sys\n"
        "for name in ('matplotlib', 'trl', 'peft', 'datasets', 'triton'): sys.modules[name] = None\n"
        "import ummrm\n"
        "assert 'ummrm.recipe' not in sys.modules and 'ummrm.cli' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
