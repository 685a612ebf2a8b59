"""A study end to end: its files, that kills and process counts leave no trace in the tables, its report, its errors."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from checkout import ROOT, SUPPORT
from tiny_study import tiny_study, two_regimes

from lab import load_study, run_study, shipped_studies, study_tables, write_report
from lab.compare import Runs, compare
from lab.store import COLUMNS, read_table
from lab.workers import StudyError
from lab.workers import locked as lock

TABLES = ("runs", "curves", "experts")


def tables(folder):
    return {name: (folder / f"{name}.csv").read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = two_regimes()
    run_study(study, folder, progress=False)
    return study, folder


def test_every_unit_is_a_row_and_every_table_reads_back(finished):
    study, folder = finished
    rows = read_table(folder, "runs")
    wanted = {(r, s, a, o) for r in study.regimes for s in (0,) for a in study.arms for o in study.optimisers(a)}
    assert {(row["regime"], row["seed"], row["arm"], row["optimiser"]) for row in rows} == wanted
    assert len(rows) == len(wanted) == 12
    for name, columns in COLUMNS.items():
        with open(folder / f"{name}.csv") as file:
            assert tuple(next(csv.reader(file))) == columns
    assert not (folder / "stages").exists()


def test_the_proxy_rises_by_construction_and_rewards_start_at_the_policy(finished):
    _, folder = finished
    curves = [row for row in read_table(folder, "curves") if row["optimiser"] == "best_of_n"]
    for start in (row for row in curves if row["step"] == 1):
        assert abs(start["gold"]) < 1e-9 and abs(start["proxy"]) < 1e-9 and start["kl"] == 0
    one = [row["proxy"] for row in curves if (row["regime"], row["seed"], row["arm"]) == ("planted", 0, "merged")]
    assert one == sorted(one) and len(one) == 5


def test_merged_serves_as_dense_does_and_costs_more_to_train(finished):
    _, folder = finished
    rows = {(r["arm"]): r for r in read_table(folder, "runs") if r["optimiser"] == "best_of_n" and r["seed"] == 0}
    assert rows["merged"]["parameters"] == rows["dense"]["parameters"] < rows["moe"]["parameters"]
    assert rows["merged"]["serving_flops"] == rows["dense"]["serving_flops"] < rows["moe"]["serving_flops"]
    assert rows["dense"]["training_flops"] < rows["dense_longer"]["training_flops"] < rows["merged"]["training_flops"]


KILLED = """
import sys
from pathlib import Path
from tiny_study import two_regimes
from lab import run_study
if __name__ == "__main__":
    run_study(two_regimes(processes=int(sys.argv[2])), sys.argv[1], progress=False)
"""


@pytest.mark.full
def test_killed_with_all_its_workers_and_resumed_it_gives_the_same_tables(finished, tmp_path):
    """SIGKILL in the midst of the work, by two worker processes; then resumed by one process."""
    _, folder = finished
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path, str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-P", str(script), str(output), "2"], env=environment, start_new_session=True
    )
    try:
        while len(list(output.glob("units/*.json"))) < 3:
            assert process.poll() is None, "the study ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)  # the parent alone: its workers must notice
        process.wait()
    finally:
        before = 0
        while before != (before := len(list(output.glob("units/*.json")))) or before == 0:
            time.sleep(1.0)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in output.glob("units/*.json")}
    assert 3 <= len(done) < 12
    run_study(two_regimes(), output, progress=False)
    assert tables(output) == tables(folder)
    assert all((output / "units" / name).stat().st_mtime_ns == at for name, at in done.items()), "done units stay"


def test_a_study_grows_by_arms_without_running_anything_again(finished, tmp_path):
    _, folder = finished
    run_study(two_regimes(), tmp_path, arms=("dense",), progress=False)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("units/*.json")}
    run_study(two_regimes(), tmp_path, progress=False)
    assert tables(tmp_path) == tables(folder)
    assert all((tmp_path / "units" / name).read_bytes() == data for name, data in first.items())


def test_the_report_is_made_from_the_tables_alone(finished, tmp_path):
    study, folder = finished
    for name in (*COLUMNS, "study"):
        source = folder / (f"{name}.json" if name == "study" else f"{name}.csv")
        head, *rows = source.read_text().splitlines(keepends=True)
        # a second seed like the first, so that there is something to compare
        again = [row.replace(",0,", ",1,", 1) for row in rows] if source.suffix == ".csv" else []
        (tmp_path / source.name).write_text("".join([head, *rows, *again]))
    files = write_report(tmp_path)
    names = {path.name for path in files}
    assert {"report.html", "comparisons.csv", "best_of_n.png", "ppo.png", "differences.png", "accuracy.png"} <= names
    assert {"gates.png", "specialisation.png"} <= names
    for path in files:
        assert path.stat().st_size > 500, path
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == len([n for n in names if n.endswith(".png")]) and "merged, learned" in page
    comparisons = compare(study, Runs(read_table(tmp_path, "runs")))
    assert [(c.regime, c.primary) for c in comparisons[:3]] == [
        ("planted", True),
        ("unplanted", True),
        ("planted", False),
    ]
    assert f"{comparisons[0].paired.mean:+.3f}" in page
    tables = study_tables(tmp_path)
    assert list(tables) == ["planted", "unplanted", "paths", "comparisons", "experts", "left_out", "mixtures"]
    some = tables["comparisons"].select(["difference", "regime"], regime=["unplanted"], outcome=["accuracy"])
    assert some.head == ("difference", "regime") and [row[1] for row in some.rows] == ["unplanted"]
    arms = [(row[0], row[1]) for row in tables["paths"].rows]
    assert arms == [(arm, regime) for regime in study.regimes for arm in ("dense", "merged, learned")]
    for wish, message in (
        ({"columns": ["no"]}, "has the columns arm, .*got 'no'"),
        ({"arm": ["x"]}, "cells .*got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            tables["comparisons"].select(**wish)
    text = (tmp_path / "tables.md").read_text()
    assert f"| **{comparisons[0].paired.mean:+.3f}** |" in text and "merged, learned" in text
    assert len(list(csv.DictReader((tmp_path / "comparisons.csv").open()))) == 6


def test_results_of_another_configuration_are_not_mixed_in(finished):
    _, folder = finished
    other = two_regimes(dense={"steps": 6, "batch_size": 8})
    with pytest.raises(ValueError, match="made with another configuration of this arm.*choose another output folder"):
        run_study(other, folder, progress=False)


def test_a_studys_mixture_is_the_one_that_its_primary_arm_comes_from():
    other = {"other": {"kind": "moe", "upcycle": {"num_experts_per_tok": 1}}}
    assert tiny_study(other).mixture == "moe" and load_study("cpu").mixture == "moe"
    assert load_study("ablations").mixture is None, "its only mixture is another one"
    assert load_study("followup").regimes["idiosyncratic"] == load_study("cpu").regimes["idiosyncratic"]


def test_what_was_run_before_stays_good():
    """A unit of the claim study as it was kept: new fields of the configuration must not make it another one."""
    assert load_study("cpu").fingerprint("idiosyncratic", "merged_1", "best_of_n") == "c1f11eac1ac9cd92"


def test_a_study_extends_another_by_whole_sections(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: cpu\nname: mine\nseeds: 2\nmoe: {steps: 7}\n")
    (tmp_path / "further.yaml").write_text("extends: mine.yaml\nmembers: 5\n")
    mine, further, base = load_study(tmp_path / "mine.yaml"), load_study(tmp_path / "further.yaml"), load_study("cpu")
    assert (mine.name, mine.seeds, mine.moe.steps, mine.arms) == ("mine", 2, 7, base.arms)
    assert mine.moe.learning_rate == type(base.moe)().learning_rate, "a section is replaced as a whole"
    assert further == type(base).from_dict({**mine.to_dict(), "members": 5})
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    (tmp_path / "c.yaml").write_text("extends: 5\n")
    with pytest.raises(ValueError, match="`extends` must be the name or the file of a study, got 5"):
        load_study(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="`extends` must not lead back to where it came from"):
        load_study(tmp_path / "a.yaml")


def test_many_regimes_are_drawn_side_by_side_in_parts(finished, tmp_path):
    """Three regimes: the first two in one file, the third in another."""
    _, folder = finished
    facts = json.loads((folder / "study.json").read_text())
    facts["study"]["regimes"]["again"] = facts["study"]["regimes"]["planted"]
    (tmp_path / "study.json").write_text(json.dumps(facts))
    for name in COLUMNS:
        head, *rows = (folder / f"{name}.csv").read_text().splitlines(keepends=True)
        again = [row.replace("planted,", "again,", 1) for row in rows if row.startswith("planted,")]
        (tmp_path / f"{name}.csv").write_text("".join([head, *rows, *again]))
    names = {path.name for path in write_report(tmp_path)}
    assert {name for name in names if name.startswith("best_of_n")} == {"best_of_n.png", "best_of_n-2.png"}
    assert "specialisation-2.png" in names
    assert (tmp_path / "report.html").read_text().count("exploited") == 2, "a part has its plot's caption"


def test_two_runs_cannot_share_a_folder(finished):
    study, folder = finished
    with lock(folder), pytest.raises(StudyError, match="another process is at work in"):
        run_study(study, folder, progress=False)


@pytest.mark.full
def test_a_failing_worker_names_what_it_was_doing(tmp_path):
    study = two_regimes(seeds=1, processes=2, dense={"steps": 2, "batch_size": 8, "learning_rate": 1e30})
    with pytest.raises(StudyError, match=r"(?s)(un)?planted seed 0:.*Finished runs are kept"):
        run_study(study, tmp_path, progress=False)


@pytest.mark.parametrize("name", list(shipped_studies()))
def test_shipped_studies_load_and_are_their_plain_data(name):
    study = load_study(name)
    assert type(study).from_dict(study.to_dict()) == study
    assert all(c.arm in study.arms for c in study.primaries) and study.seeds >= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_study("nowhere"), "no study at nowhere, and none is shipped by that name: .*cpu"),
        (lambda: tiny_study({"odd": {"kind": "sparse"}}), "`kind` must be one of dense, dense_longer"),
        (
            lambda: tiny_study({"odd": {"kind": "moe", "upcycle": {"num_expert": 2}}}),
            "arms.odd.upcycle.* no field num_e",
        ),
        (lambda: tiny_study({"a b": {"kind": "moe"}}), "names of arms and regimes must be letters"),
        (lambda: tiny_study(primary={"arm": "best"}), "a comparison must be of arms, .*got 'best'"),
        (lambda: tiny_study(primary={"optimiser": "ppo"}), "needs `ppo: true` of the arm 'dense_longer'"),
        (lambda: run_study(tiny_study(), "unused", arms=("x",)), "`arms` must be among dense, .*, got x"),
    ],
)
def test_mistakes_are_clear_errors(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()
