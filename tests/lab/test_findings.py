"""The pages of findings say what the kept studies say: tables, numbers in the text, and that the studies are whole."""

import csv
import gzip
import json
import re

import pytest
from checkout import ROOT

from bench import targets
from bench.record import DENSE, OURS, TORCH_GROUPED, TRANSFORMERS_GROUPED
from lab import StudyConfig, load_study, study_tables
from lab.backbone.config import BackboneStudy
from lab.backbone.report import backbone_comparisons
from lab.backbone.run import TABLES as BACKBONE_TABLES
from lab.compare import Runs, compare, write_comparisons
from lab.findings import RESULTS, filled, made, prose
from lab.store import COLUMNS, read_table

PAGES = {"README.md": 1, "docs/findings.md": 6, "docs/search.md": 5, "docs/first-findings.md": 6}  # tables at least
ELSEWHERE = {"README.md": {"3.10", "2.11", "2.0", "2512.00724"}}  # versions, a paper
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
KEPT = sorted(path.name for path in RESULTS.iterdir())
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+(?!\w|\.\d)")


def kept(name):
    data = json.loads((RESULTS / name / "study.json").read_text())["study"]
    return (BackboneStudy if data.get("kind") == "backbone" else StudyConfig).from_dict(data), RESULTS / name


def wanted_runs(study):
    """Regime, seed, arm and optimiser of every row that a study has."""
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    if isinstance(study, BackboneStudy):
        return {
            (regime, seed, study.run_name(arm, variation), o)
            for regime in study.regimes
            for arm in study.arms_of(regime)
            for variation in study.variations(regime, arm)
            for o in study.optimisers(arm)
            for seed in seeds[: study.seeds_of(arm, tuple(seeds), o)]
        }
    arms = [(regime, arm, o) for regime in study.regimes for arm in study.arms for o in study.optimisers(arm)]
    return {(regime, seed, arm, o) for regime, arm, o in arms for seed in seeds}


def numbers(data):
    """All numbers of a study's configuration, as a text may write them."""
    if isinstance(data, dict):
        return {n for value in data.values() for n in numbers(value)}
    if isinstance(data, (list, tuple)):
        return {n for value in data for n in numbers(value)}
    return {f"{data:g}", str(data)} if isinstance(data, float) else set()


def cells(path):
    """A CSV file's rows, numbers as floats."""

    def cell(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [[cell(text) for text in row] for row in csv.reader(file)]


@pytest.mark.parametrize("page", PAGES)
def test_every_table_is_what_the_kept_studies_give(page):
    text = TEXTS[page]
    assert text.count("<!-- table ") >= PAGES[page]
    assert filled(text) == text, "run python -m lab findings"


def speeds():
    """The least and the most that the layer gained on each contender in the run on a GPU that the README speaks of."""
    record = json.loads((ROOT / "bench/results/nvidia-h200/2026-11-29.json").read_text())["stages"]["bench"]["numbers"]
    run = targets.Entries(record)
    ours = [e for e in run.entries if (e["suite"], e["direction"], e["label"]) == ("moe_ffn", "forward+backward", OURS)]
    ratios = {}
    for entry in (e for e in ours if e["outcome"] == "measured"):
        for label in (DENSE, TORCH_GROUPED, TRANSFORMERS_GROUPED):
            ratio = targets.seconds(run.rival(entry, label)) / targets.seconds(entry)
            ratios.setdefault(label, []).append(ratio)
    return {f"{end(values):.2f}" for values in ratios.values() for end in (min, max)}


@pytest.mark.parametrize("page", PAGES)
def test_every_number_in_the_text_stands_in_a_table_or_a_configuration(page):
    text = TEXTS[page]
    known = {number.lstrip("+") for number in NUMBER.findall(made(text))} | (speeds() if page == "README.md" else set())
    for name in KEPT:
        known |= numbers(kept(name)[0].to_dict())
    said = [number.lstrip("+") for number in NUMBER.findall(prose(text).replace("−", "-"))]
    assert len(said) >= (10 if page in ("docs/findings.md", "docs/first-findings.md") else 0)
    assert not sorted(set(said) - known - ELSEWHERE.get(page, set()))


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_study_is_whole_and_its_command_gives_it(name):
    study, folder = kept(name)
    rows = read_table(folder, "runs")
    wanted = wanted_runs(study)
    assert {(row["regime"], row["seed"], row["arm"], row["optimiser"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    shipped = load_study(study.name if study.name != "lab" else "cpu").to_dict()
    free = {name: getattr(study, name) for name in ("seeds", "first_seed", "processes")}
    assert {**shipped, **free} == study.to_dict()
    assert any(f"make lab-{name}" in text for text in TEXTS.values())
    command, *options = re.search(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    made, given = load_study(command), dict(zip(options[::2], options[1::2], strict=True))
    assert made.name == study.name and set(given) <= {"--first-seed", "--seeds"}
    assert int(given.get("--first-seed", made.first_seed)) == study.first_seed
    assert int(given.get("--seeds", made.seeds)) == study.seeds


@pytest.mark.parametrize("name", KEPT)
def test_kept_comparisons_are_those_of_the_kept_runs(name, tmp_path):
    study, folder = kept(name)
    backbone = isinstance(study, BackboneStudy)
    made = (backbone_comparisons if backbone else compare)(study, Runs(read_table(folder, "runs")))
    write_comparisons(tmp_path / "comparisons.csv", made)
    again, before = cells(tmp_path / "comparisons.csv"), cells(folder / "comparisons.csv")
    assert len(again) == len(before)
    assert len(before) > len(study.regimes) or (backbone and not study.primaries)
    for row, old in zip(again, before, strict=True):
        for one, other in zip(row, old, strict=True):
            # another processor's last digits may differ
            assert one == (pytest.approx(other, rel=1e-9, abs=1e-12) if isinstance(other, float) else other)
    tables = dict(BACKBONE_TABLES if backbone else COLUMNS)
    del tables["curves"]  # which are not kept
    for table, columns in tables.items():
        plain, packed = folder / f"{table}.csv", folder / f"{table}.csv.gz"
        assert plain.is_file() != packed.is_file()
        with open(plain, newline="") if plain.is_file() else gzip.open(packed, "rt", newline="") as file:
            assert tuple(next(csv.reader(file))) == columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table claim idiosyncratic -->\n", "needs an `<!-- end -->`"),
        ("<!-- table claim elsewhere -->\n<!-- end -->", "has the tables shared_bias.*got 'elsewhere'"),
        ("<!-- table claim idiosyncratic | columns: charm -->\n<!-- end -->", "has the columns arm.*got 'charm'"),
        ("<!-- table claim comparisons | outcome: luck -->\n<!-- end -->", "has the cells .*got 'luck'"),
    ],
)
def test_a_table_that_cannot_be_made_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        filled(text)


def test_tables_are_picked_from_and_text_is_told_from_tables():
    wish = "<!-- table claim idiosyncratic | columns: arm; accuracy; parameters | arm: dense -->\n"
    text = f"Before 1.5.\n\n{wish}stale\n<!-- end -->\n\n`2.5`\n\n    3.5\n\nafter 4.5"
    new = filled(text)
    rows = [row for row in study_tables(RESULTS / "claim")["idiosyncratic"].rows if row[0] == "dense"]
    assert new.count("|\n") == 3 and f"| dense | {rows[0][5]} | 47,520 |\n<!-- end -->" in new and "stale" not in new
    assert NUMBER.findall(prose(new)) == ["1.5", "4.5"]
    assert made(f"| 6.5 |\n{new}").splitlines()[-1] == f"| dense | {rows[0][5]} | 47,520 |" and "6.5" not in made(new)
