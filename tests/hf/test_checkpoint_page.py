"""docs/checkpoints.md against checkpoints of each kind: files, keys of config.json, tensors, and what errors say."""

import ast
import contextlib
import json
import re
from typing import NamedTuple

import pytest
import torch
from checkout import ROOT
from safetensors import safe_open
from test_registry import structure_model
from tiny_models import tiny_model
from trl_inputs import make_tokenizer
from typer.testing import CliRunner

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.cli import app
from ummrm.hf.configuration import FORMAT_VERSION, KEYS, OLDEST_FORMAT
from ummrm.hf.families import FAMILIES
from ummrm.nn.dense import Projection, is_linear

PAGE = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
DTYPE = {"fp32": "F32", "model": "BF16"}


class Row(NamedTuple):
    name: str
    phases: tuple
    shapes: tuple
    dtype: str


def table(section):
    """Cells of the first table of a section, without its head."""
    body = PAGE.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def tensor_rows():
    """The rows of the table of tensors; those of experts again for shared ones, as the page says."""
    rows = []
    for name, phases, shape, dtype, _ in table("Tensors"):
        phases = ("mixture", "merging") if phases == "both" else (phases,)
        row = Row(name.strip("`"), phases, tuple(re.findall(r"\[(.*?)\]", shape)), DTYPE[dtype])
        rows.append(row)
        if ".experts." in row.name:
            shapes = tuple(re.sub(r"^E", "S", one) for one in row.shapes)
            rows.append(row._replace(name=row.name.replace(".experts.", ".shared_experts."), shapes=shapes))
    return rows


class Case(NamedTuple):
    """A dense model, how it is upcycled, and how it is merged."""

    family: str
    config: UpcycleConfig
    merging: MergeConfig
    overrides: dict = {}
    fresh: bool = False


TOKEN = {"num_experts": 3, "num_experts_per_tok": 2}
SEQUENCE = {"assignment": "sequence", "num_experts": 3}
CASES = {
    "gated": Case("llama", UpcycleConfig(**TOKEN, layers=(1,)), MergeConfig()),
    "biases": Case(
        "llama",
        UpcycleConfig(**SEQUENCE, experts_in="linear"),
        MergeConfig(alpha_per="projection"),
        {"mlp_bias": True, "attention_bias": True},
    ),
    "plain": Case(
        "gpt_neox",
        UpcycleConfig(**TOKEN, num_shared_experts=2, router="mlp", router_noise="learned"),
        MergeConfig(alpha_per="projection", learn_shared_share=True),
    ),
    "shared by sequence": Case("llama", UpcycleConfig(**SEQUENCE, num_shared_experts=1), MergeConfig()),
    "transposed": Case("gpt2", UpcycleConfig(**SEQUENCE, experts_in="linear"), MergeConfig()),
    "heads": Case("bert", UpcycleConfig(**SEQUENCE, experts_in="all"), MergeConfig(), fresh=True),
    "gated biases": Case("llama", UpcycleConfig(**TOKEN), MergeConfig(), {"mlp_bias": True}),
}


def saved(model, folder):
    """(dtype, shape) of each tensor in the files, and config.json."""
    ummrm.save_pretrained(model, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        slices = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    return found, json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By case: of the dense model, the mixture, the merging and the merged model what `saved` gives; and sizes."""
    root, found = tmp_path_factory.mktemp("kinds"), {}
    for name, case in CASES.items():
        dense = tiny_model(case.family, dtype=torch.bfloat16, **case.overrides)
        linears = {n: tuple(Projection(m).weight.shape) for n, m in dense.named_modules() if is_linear(m)}
        kinds = {"dense": saved(dense, root / name / "dense")}
        fresh = {"new_head": True, "tokenizer": make_tokenizer()} if case.fresh else {}
        expected = pytest.warns(UserWarning, match="is a fresh head") if case.fresh else contextlib.nullcontext()
        with expected:
            moe = ummrm.upcycle(dense, case.config, **fresh)
        sites, prefix = set(ummrm.hf.modeling.ffn_sites(moe).values()), moe.base_model_prefix
        kinds["mixture"] = saved(moe, root / name / "mixture")
        merging = ummrm.prepare_merge(moe, case.merging)
        kinds["merging"] = saved(merging, root / name / "merging")
        kinds["merged"] = saved(ummrm.merge(merging), root / name / "merged")
        found[name] = kinds, linears, sites, prefix
    return found


def sizes_of(case, linears, place):
    """What the letters of a shape may stand for at a place."""
    config = case.config
    n, d = linears.get(place, (None, None))
    gated = case.family == "llama"
    letters = {"E": config.num_experts, "S": config.num_shared_experts, "H": 24, "I": 44, "2I": 88}
    return {**letters, "N": n, "D": d, "P": 3 if gated else 2, "1": 1}


def row_of(name, rows, sites, linears, prefix):
    """The rows whose name a tensor has, and the place that the name stands for."""
    found = []
    for row in rows:
        kind, _, rest = row.name.partition(".")
        if not name.endswith(f".{rest}"):
            continue
        place = name.removesuffix(f".{rest}")
        head = place in linears and not place.startswith(f"{prefix}.")
        places = {"SITE": place in sites, "BACKBONE": place == prefix, "HEAD": head}
        places["LINEAR"] = place in linears and place.startswith(f"{prefix}.") and place not in sites
        if places[kind]:
            found.append((row, place))
    return found


def test_the_tensors_of_every_kind_are_those_of_the_page(written):
    rows, met = tensor_rows(), set()
    for name, (kinds, linears, sites, prefix) in written.items():
        case, (dense, _) = CASES[name], kinds["dense"]
        for phase in ("mixture", "merging"):
            tensors, _ = kinds[phase]
            ours = {key: value for key, value in tensors.items() if key not in dense}
            for key, (dtype, shape) in ours.items():
                matches = row_of(key, rows, sites, linears, prefix)
                assert len(matches) == 1, (name, phase, key, matches)
                row, place = matches[0]
                letters = sizes_of(case, linears, place)
                shapes = [tuple(letters[one] for one in text.split(", ")) for text in row.shapes]
                assert phase in row.phases and dtype == row.dtype and shape in shapes, (name, key, row, shape)
                met.add((row.name, phase, shapes.index(shape)))
            kept = {key: value for key, value in tensors.items() if key in dense}
            assert all(value == dense[key] for key, value in kept.items()), (name, phase)
            exchanged = {place for key in ours for _, place in row_of(key, rows, sites, linears, prefix)}
            check_gone(case, set(dense) - set(tensors), exchanged, linears, sites)
        assert kinds["merged"][0] == dense, name
    listed = {(row.name, phase, i) for row in rows for phase in row.phases for i in range(len(row.shapes))}
    assert met == listed, "a row that no checkpoint has"


def check_gone(case, gone, exchanged, linears, sites):
    """What is no longer there are the weights and biases of the FFNs' projections and of exchanged linear layers."""
    row = FAMILIES[case.family]
    holders = {key.rpartition(".")[0] for key in gone}
    layers = {site.removesuffix(f".{row.site}") for site in sites}
    projections = {f"{layer}.{path.partition('[')[0]}" for layer in layers for path in row.paths.modules}
    assert holders == projections | {place for place in exchanged if place in linears and place not in sites}


def test_the_keys_of_every_kind_are_those_of_the_page(written, tmp_path):
    keys = {row[0].strip("`") for row in table("Keys of config.json")}
    assert keys == {"model_type", *KEYS}
    seen = set()
    for kinds, *_ in written.values():
        for phase in ("mixture", "merging"):
            config = kinds[phase][1]
            held = {key for key in config if key.startswith("umm")}
            assert held == keys - {"model_type", "umm_family", "umm_code"} - (
                {"umm_merge"} if phase == "mixture" else set()
            )
            assert config["model_type"].startswith("umm_") and config["umm_phase"] == phase
            assert UpcycleConfig.from_dict(config["umm"]).to_dict() == config["umm"]
            assert config["umm_format_version"] == 1 and config["umm_base_model"] is None
            seen |= held
        merged, dense = kinds["merged"][1], kinds["dense"][1]
        assert not re.search(r"\bumm(rm)?\b|\bumm_|\bUmm[A-Z]", json.dumps(merged))
        assert merged["model_type"] == dense["model_type"] and merged["architectures"] == dense["architectures"]
    _, config = saved(ummrm.upcycle(structure_model(), UpcycleConfig()), tmp_path)
    assert seen | {"umm_family", "umm_code"} == set(KEYS)  # the latter: tests/cli/test_remote_code.py
    assert config["umm_family"]["model_type"] == "smollm3"
    assert "writes and reads\nformat 1." in PAGE and FORMAT_VERSION == OLDEST_FORMAT == 1


def test_the_normalization_of_rewards_is_in_every_kind(tmp_path):
    moe = ummrm.upcycle(tiny_model("llama"), UpcycleConfig(**TOKEN))
    ummrm.set_reward_normalization(moe, ummrm.RewardNormalization(mean=1.0, std=2.0))
    merging = None
    for kind in ("mixture", "merging", "merged"):
        merging = ummrm.prepare_merge(moe) if kind == "merging" else merging
        model = {"mixture": moe, "merging": merging}.get(kind) or ummrm.merge(merging)
        _, config = saved(model, tmp_path / kind)
        assert {"mean", "std"} <= config["reward_normalization"].keys(), kind


def test_the_files_of_every_kind_are_those_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", "ForCausalLM").save_pretrained("dense")
    make_tokenizer().save_pretrained("dense")
    brought = {"LICENSE", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    (tmp_path / "dense/LICENSE").write_text("ours")
    for job in ("upcycle dense moe --no-new-head --max-shard-size 60KB", "merge moe merged --max-shard-size 10KB"):
        result = CliRunner().invoke(app, job.split())
        assert result.exit_code == 0, result.output
    first, rest = "model.safetensors", r"model-\d{5}-of-\d{5}\.safetensors"
    listed = {row[0].partition(",")[0].strip("`") for row in table("Files")}
    numbered = {name for name in listed if re.fullmatch(rest, name)}
    for kind, card in (("moe", set()), ("merged", {"README.md"})):
        names = {path.name for path in (tmp_path / kind).iterdir()}
        shards = {name for name in names if re.fullmatch(rest, name)}
        assert names - shards == listed - numbered - {first, "README.md"} | card | brought, kind
        index = json.loads((tmp_path / kind / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == shards and len(shards) > 1
        total = 0
        for shard in shards:
            with safe_open(tmp_path / kind / shard, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            assert {name for name, at in index["weight_map"].items() if at == shard} == set(tensors)
            held = sum(t.numel() * t.element_size() for t in tensors.values())
            assert held <= (60_000 if kind == "moe" else 10_000) or len(tensors) == 1
            total += held
        assert index["metadata"]["total_size"] == total and index["metadata"]["total_parameters"] == total // 4
    assert len(numbered) == 1 and first in listed


def said_by_the_code():
    """Every text of the package, with what is filled in left out."""
    texts = []
    for path in (ROOT / "ummrm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_what_errors_are_said_to_say_they_say():
    texts, quoted = said_by_the_code(), 0
    for what, _, message in table("What is refused, and why"):
        parts = re.findall(r"`(.+?)`", message)
        assert parts, what
        for part in parts:
            assert any(part in text for text in texts), f"{what}: no error says {part!r}"
        quoted += len(parts)
    assert quoted > 15
