"""Studies from a pretrained backbone end to end: tables, resuming, what arms cost, the choice of rates, errors."""

import csv
import dataclasses
import json
import math

import pytest
import torch
import yaml
from tiny_backbone import tiny_backbone

from lab import load_study, study_tables, write_report
from lab.backbone.arms import BackboneArms, in_scale_of
from lab.backbone.choice import Search, candidates, chosen_yaml
from lab.backbone.config import BackboneStudy, Variation
from lab.backbone.measures import Scores, calibration_error, combined
from lab.backbone.report import Shown
from lab.backbone.run import TABLES, _groups, _works, make_block, run_backbone_study
from lab.backbone.training import train_dense
from lab.compare import Runs, compare
from lab.config import ComparisonConfig
from lab.store import read_table

SAME = ("runs", "curves")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    run_backbone_study(tiny_backbone(), folder, progress=False)
    return folder


def tables(folder):
    return {name: (folder / f"{name}.csv").read_bytes() for name in SAME}


def test_every_arm_variation_and_seed_is_a_row(finished):
    study, rows = tiny_backbone(), read_table(finished, "runs")
    wanted = {
        (regime, seed, study.run_name(arm, variation))
        for regime in study.regimes
        for arm in study.arms_of(regime)
        for variation in study.variations(regime, arm)
        for seed in range(3)
    }
    assert {(row["regime"], row["seed"], row["arm"]) for row in rows} == wanted and len(rows) == len(wanted) == 90
    assert "dense_s5_r1000" in {row["arm"] for row in rows} and "runs_s3_r100" in {row["arm"] for row in rows}
    assert "weighted_s3_r100" not in {row["arm"] for row in rows if row["regime"] == "idiosyncratic"}
    for name, columns in TABLES.items():
        with open(finished / f"{name}.csv") as file:
            assert tuple(next(csv.reader(file))) == columns
    missing = {name for row in rows for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
    assert missing <= {"accuracy_tail", "member_correlation"} and not (finished / "stages").exists()


def test_blocks_and_interruptions_leave_no_trace(finished, tmp_path):
    study = tiny_backbone()
    units = sorted((finished / "units").iterdir())
    for unit in units[::3]:
        target = tmp_path / "units" / unit.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(unit.read_bytes())
    damaged = tmp_path / "units" / units[0].name
    damaged.write_text(damaged.read_text().replace('"gold_peak": ', '"gold_peak": 1'))
    with pytest.warns(UserWarning, match="is damaged"):
        run_backbone_study(dataclasses.replace(study, processes=2), tmp_path, progress=False)
    assert tables(tmp_path) == tables(finished)
    alone = tmp_path / "alone"
    run_backbone_study(dataclasses.replace(study, block=3), alone, ("dense", "sequence"), progress=False)
    kept = {(r["regime"], r["seed"], r["arm"]): r for r in read_table(finished, "runs")}
    for row in read_table(alone, "runs"):
        assert repr(row) == repr(kept[row["regime"], row["seed"], row["arm"]])


def test_an_arm_may_have_fewer_seeds(finished, tmp_path):
    arms = {**tiny_backbone().to_dict()["arms"]}
    arms = {name: {**arms[name], "steps": [3], "rates": [1e-3]} for name in ("dense", "counterfactual")}
    arms["counterfactual"]["most_seeds"] = 2
    comparison = {"arm": "counterfactual_s3_r100", "against": "dense_s3_r100", "outcome": "accuracy"}
    study = tiny_backbone(arms=arms)
    run_backbone_study(study, tmp_path, progress=False)
    rows = read_table(tmp_path, "runs")
    assert sorted({r["seed"] for r in rows if r["arm"] == "counterfactual_s3_r100"}) == [0, 1]
    assert sorted({r["seed"] for r in rows if r["arm"] == "dense_s3_r100"}) == [0, 1, 2]
    shown = dataclasses.replace(Shown.of(study), secondary=(ComparisonConfig(**comparison),))
    (found,) = (c for c in compare(shown, Runs(rows)) if c.regime == "planted")
    assert found.paired.seeds == 2 and found.missing == 0


def test_searches_are_chosen_from_together(finished):
    rows = read_table(finished, "runs")
    first = tiny_backbone()
    second = tiny_backbone(arms={"dense": {**first.to_dict()["arms"]["dense"], "steps": [5], "rates": [1e-2]}})
    third = tiny_backbone(arms={"dense": {**first.to_dict()["arms"]["dense"], "steps": [3], "rates": [1e-3, 1e-2]}})
    alone = candidates(Search(second, Runs(rows)))
    assert all(c.chosen for c in alone) and len(alone) == 2
    whole = [c for c in candidates(Search(first, Runs(rows))) if c.arm == "dense"]
    pooled = candidates(Search(second, Runs(rows)), Search(third, Runs(rows)))
    assert {(c.regime, c.variation, c.means) for c in pooled} < {(c.regime, c.variation, c.means) for c in whole}
    assert len(pooled) == 6 and sum(c.chosen for c in pooled) == 2
    head = chosen_yaml(Search(second, Runs(rows)), Search(third, Runs(rows))).splitlines()[0]
    assert head.endswith("from tiny and tiny, seeds 0 to 2.")
    other = tiny_backbone(arms={"dense": {**first.to_dict()["arms"]["dense"], "pairs": "counterfactual"}})
    with pytest.raises(ValueError, match="the arm dense must be the same in all search studies"):
        candidates(Search(first, Runs(rows)), Search(other, Runs(rows)))
    with pytest.raises(ValueError, match="must have the same seeds"):
        candidates(Search(first, Runs(rows)), Search(first, Runs([r for r in rows if r["seed"]])))


def test_a_regime_may_start_from_a_trained_model(tmp_path):
    regimes = tiny_backbone().to_dict()["regimes"]
    study = tiny_backbone(
        regimes={**regimes, "trained": {**regimes["idiosyncratic"], "trained": {"steps": 3, "rate": 1e-2}}},
        arms={
            "start": {"kind": "dense", "rates": [1.0], "steps": [0]},
            "continued": {"kind": "dense", "rates": [1e-3], "steps": [2]},
            "student": {"kind": "distilled", "of": "continued", "rates": [1e-9], "steps": [1]},
        },
    )
    assert study.fingerprint("idiosyncratic", "start") != study.fingerprint("trained", "start")
    seeds = (0, 1, 2)
    block = make_block(study, "idiosyncratic", seeds, None, lambda *_: None)
    trained = make_block(study, "trained", seeds, tmp_path, lambda *_: None)
    wanted = train_dense(block, 3, study.batch, 1e-2, study.optimisation, "start")
    again = make_block(study, "trained", seeds, tmp_path, lambda *_: None)
    for name, value in wanted.items():
        assert torch.equal(trained.start[name], value) and torch.equal(again.start[name], value), name
        assert not torch.equal(value, block.start[name]), name
    arms = BackboneArms(study, "trained", trained)
    start, student = (arms.make(name, study.variations("trained", name)[0]) for name in ("start", "student"))
    for name, value in wanted.items():
        assert torch.equal(start.parameters[name], value), name
        torch.testing.assert_close(student.parameters[name], value, atol=1e-7, rtol=1e-6)


def test_workers_get_the_first_blocks_of_all_regimes_first():
    assert [str(group) for group in _groups(_works(tiny_backbone(), ("dense",), ()))] == [
        "idiosyncratic, seeds 0 to 1",
        "planted, seeds 0 to 1",
        "idiosyncratic, seeds 2 to 2",
        "planted, seeds 2 to 2",
    ]


def test_another_configuration_is_refused(finished):
    with pytest.raises(ValueError, match="was made with another configuration"):
        run_backbone_study(tiny_backbone(batch=8), finished, progress=False)
    with pytest.raises(ValueError, match="`arms` must be among dense, .*, got luck"):
        run_backbone_study(tiny_backbone(), finished, ("luck",))


def test_the_report_shows_arms_and_choice(finished):
    files = write_report(finished)
    assert {path.name for path in files} >= {"choice.csv", "comparisons.csv", "best_of_n.png", "report.html"}
    made = study_tables(finished)
    assert len(made["idiosyncratic"].rows) == 14 and len(made["planted"].rows) == 16
    summary, planted = made["summary"], made["planted"]
    assert summary.head[1:3] == ("no plant: accuracy", "no plant: gold at KL 1") and len(summary.rows) == 16
    weighted = next(row for row in summary.rows if row[0].startswith("weighted"))
    theirs = planted.select(["accuracy on the policy's answers"], arm=[weighted[0]]).rows[0]
    assert weighted[1:3] == ("", "") and weighted[3] == theirs[0] and weighted[-1] == "1.00"
    assert made["planted"].rows[0][0] == "dense model; 3 steps, rate 0.001"
    assert len(made["choice"].rows) == 11 + 13
    assert "Chosen on these seeds" in (finished / "report.html").read_text()


def test_the_choice_is_the_best_of_each_arm_and_a_claim_reads_it(finished, tmp_path):
    study, runs = tiny_backbone(), Runs(read_table(finished, "runs"))
    found = candidates(Search(study, runs))
    dense = [c for c in found if (c.regime, c.arm) == ("planted", "dense")]
    assert len(dense) == 4 and sum(c.chosen for c in dense) == 1
    best = next(c for c in dense if c.chosen)
    assert all(c.score <= best.score == 0 for c in dense)
    (tmp_path / "rates.yaml").write_text(chosen_yaml(Search(study, runs)))
    data = {**study.to_dict(), "name": "claim", "chosen": "rates.yaml", "first_seed": 7, "seeds": 2}
    data["primaries"] = [{"arm": "distilled", "against": "dense", "outcome": "accuracy_policy"}]
    (tmp_path / "claim.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False))
    claim = load_study(tmp_path / "claim.yaml")
    assert claim.variations("planted", "dense") == (best.variation,)
    chosen = yaml.safe_load((tmp_path / "rates.yaml").read_text())
    one = chosen["planted"].pop("distilled")  # its teacher's choice and its one rate say the same
    one_less = BackboneStudy.from_dict({**claim.to_dict(), "chosen": chosen})
    assert dataclasses.asdict(*one_less.variations("planted", "distilled")) == one
    assert one_less.fingerprint("planted", "distilled") == claim.fingerprint("planted", "distilled")
    del chosen["planted"]["dense"]
    with pytest.raises(ValueError, match="one variation of every arm of the regime planted; it does not of dense"):
        BackboneStudy.from_dict({**claim.to_dict(), "chosen": chosen})
    run_backbone_study(claim, tmp_path / "out", ("dense", "distilled"), progress=False)
    write_report(tmp_path / "out")
    rows = read_table(tmp_path / "out", "runs")
    assert {row["arm"] for row in rows} == {"dense", "distilled"} and len(rows) == 8
    with open(tmp_path / "out/comparisons.csv") as file:
        assert [row["primary"] for row in csv.DictReader(file)] == ["True", "True"]
    (tmp_path / "rates.yaml").unlink()
    with pytest.raises(ValueError, match="`chosen` must name a file beside the study's, got 'rates.yaml'"):
        load_study(tmp_path / "claim.yaml")


def test_costs_are_those_of_what_an_arm_is_made_of():
    study = tiny_backbone(seeds=1, block=1)
    block = make_block(study, "planted", (0,), None, lambda stage, done, total: None)
    makers = BackboneArms(study, "planted", block)
    dense = makers.make("dense", Variation(3, 1e-3))
    forward = block.network.forward_flops(block.length)
    assert dense.training_flops == pytest.approx((3 * forward * 3 * 2 * 4 * block.length).item())
    runs, warm = (makers.make(name, Variation(3, 1e-3)) for name in ("runs", "warm"))
    assert runs.training_flops == warm.training_flops == pytest.approx(2 * dense.training_flops)
    assert runs.serving_flops == 2 * dense.serving_flops and runs.served == 2 * dense.served
    sequence, members = (makers.make(name, Variation(4, 1e-2)) for name in ("sequence", "members"))
    assert sequence.training_flops == members.training_flops == pytest.approx(4 / 3 * dense.training_flops)
    assert sequence.serving_flops == dense.serving_flops and sequence.served == dense.served < members.served
    distilled = makers.make("distilled", Variation(4, 1e-2, 1e-3))
    assert distilled.training_flops > sequence.training_flops and distilled.served == dense.served
    token, mixture = (makers.make(name, Variation(5, 1e-2)) for name in ("token", "mixture"))
    assert token.serving_flops == dense.serving_flops < mixture.serving_flops
    assert token.training_flops > 5 / 3 * dense.training_flops


def test_a_target_has_the_students_scale():
    generator = torch.Generator().manual_seed(0)
    targets, own = (torch.randn(2, 50, generator=generator).double() for _ in range(2))
    moved = in_scale_of(targets, 3 * own + 7)
    torch.testing.assert_close(moved.mean(1), (3 * own + 7).mean(1))
    torch.testing.assert_close(moved.std(1), 3 * own.std(1))
    torch.testing.assert_close(in_scale_of(5 * targets + 1, None), in_scale_of(targets, None))


def test_members_are_normalised_before_they_combine():
    one = torch.tensor([[0.0, 1.0, 2.0]]).double()
    first, second = (Scores({"policy": s, "reference": s}) for s in (one, 10 * one.flip(1)))
    mean, worst = (combined([first, second], rule, 0.5).sets["policy"] for rule in ("mean", "worst"))
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(worst, 5.5 * torch.tensor([[-1.0, 0.0, -1.0]]).double())
    assert combined([first], "mean", 0.0) is first


def test_members_that_agree_correlate(finished):
    rows = {(r["regime"], r["seed"], r["arm"]): r["member_correlation"] for r in read_table(finished, "runs")}
    ensembles = {arm: value for (_, _, arm), value in rows.items() if arm.startswith(("runs", "members_"))}
    assert ensembles and all(-1 <= value <= 1 for value in ensembles.values())
    assert all(math.isnan(value) for (_, _, arm), value in rows.items() if arm.startswith("dense"))


def test_a_student_may_learn_on_few_answers_or_on_those_of_the_pairs():
    arms = tiny_backbone().to_dict()["arms"]
    few = {**arms["fresh"], "answers": 16}
    study = tiny_backbone(arms={**arms, "few": few, "on_pairs": {**arms["fresh"], "texts": "pairs"}})
    block = make_block(study, "planted", (0, 1), None, lambda *_: None)
    made = BackboneArms(study, "planted", block)
    whole, sixteen, pairs = (
        made.make(name, study.variations("planted", name)[0]) for name in ("fresh", "few", "on_pairs")
    )
    assert len(block.without_labels("pairs")) == 96 and len(block.without_labels("policy", 16)) == 16
    for other in (sixteen, pairs):
        assert not torch.equal(whole.parameters["score"], other.parameters["score"])
    # the teacher scores 16 answers instead of 64, the student's own training is the same
    saved = (whole.training_flops - sixteen.training_flops) / whole.serving_flops
    assert bool((saved > 0).all())
    only = dataclasses.replace(block, unlabelled=block.unlabelled.first(16))
    again = BackboneArms(study, "planted", only).make("fresh", study.variations("planted", "fresh")[0])
    for name, value in again.parameters.items():
        assert torch.equal(value, sixteen.parameters[name]), name


def test_calibration_knows_the_noise_of_labels():
    """Probabilities of 0.8, all right, are calibrated where a fifth of training labels were wrong."""
    sure = torch.full((100,), math.log(4), dtype=torch.float64)
    assert calibration_error(sure, 0.2) == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, 0.0) == pytest.approx(0.2)
    half = torch.cat([sure, -sure])
    assert calibration_error(half, 0.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"kind": "luck"}}, "`kind` must be one of dense"),
        ({"a": {"kind": "dense", "rates": [1e-3]}}, "`steps` must be numbers of steps"),
        ({"a": {"kind": "ensemble", "of": "b"}}, "must name arms that stand before it, got 'b'"),
        (
            {"a": {"kind": "dense", "rates": [1e-3], "steps": [2]}, "b": {"kind": "mixture", "of": "a"}},
            "`of` must be an arm of kind token, got 'a'",
        ),
        (
            {
                "a": {"kind": "dense", "rates": [1e-3], "steps": [5], "own_heads": True},
                "b": {"kind": "weight_average", "of": "a"},
            },
            "`of` must be runs from a common head to average their weights, got 'a'",
        ),
        (
            {"a": {"kind": "token", "rates": [1e-3], "steps": [50], "upcycle": {"num_shared_experts": 2}}},
            "`upcycle.num_shared_experts` must be 1 here, got 2",
        ),
    ],
)
def test_impossible_arms_are_refused(arms, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone(arms=arms)
