"""PPO in studies from a pretrained backbone: units and rows of its own, the policy's start, an arm's reward, errors."""

import csv
import dataclasses
import math

import pytest
import torch
from tiny_backbone import tiny_backbone

from lab import study_tables, write_report
from lab.backbone.arms import BackboneArms
from lab.backbone.config import Variation
from lab.backbone.data import Answers
from lab.backbone.measures import reference
from lab.backbone.ppo import policy_path, reward_of, start_of
from lab.backbone.report import Shown
from lab.backbone.run import make_block, run_backbone_study
from lab.demo.measure import rewards_of
from lab.plots import over_optimisation
from lab.policy import sample
from lab.seeds import derive
from lab.store import read_table
from lab.tasks import Sequences

ARMS = {
    "dense": {"kind": "dense", "rates": [1e-2], "steps": [3], "runs": 2},
    "runs": {"kind": "ensemble", "of": "dense"},
    "sequence": {"kind": "sequence", "rates": [1e-2], "steps": [3], "sequencing": {"experts": 2, "shared_weight": 0.5}},
    "members": {"kind": "ensemble", "of": "sequence", "rule": "uwo"},
    "token": {"kind": "token", "rates": [1e-2], "steps": [3], "alpha_steps": 1, "upcycle": {"num_experts_per_tok": 2}},
    "mixture": {"kind": "mixture", "of": "token"},
}
PPO = {
    "arms": ["dense", "members"],
    "seeds": 2,
    "answer_tokens": 14,
    "settings": {"steps": 2, "batch_size": 16, "learning_rate": 1e-2, "normalisation_samples": 16},
}


def study(**changes):
    """Two of the arms under PPO, in the first two of three seeds."""
    plain = tiny_backbone()
    planted = dataclasses.asdict(plain.regimes["planted"])
    variation = {"steps": 3, "rate": 1e-2, "student_rate": 0.0}
    whole = {
        "regimes": {"planted": planted},
        "arms": ARMS,
        "chosen": {"planted": dict.fromkeys(ARMS, variation)},
        "ppo": PPO,
        "measure": {"fixed_kl": 1.0, "ppo_fixed_kl": 1e-4, "ppo_window": 1},
        "primaries": [{"arm": "members", "against": "dense"}],
        "secondary": [{"arm": "members", "against": "dense", "optimiser": "ppo", "outcome": "gold_end"}],
    }
    return tiny_backbone(**whole | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run without PPO at first, as studies were before it was there."""
    folder = tmp_path_factory.mktemp("ppo")
    run_backbone_study(study(ppo=None, secondary=[]), folder, progress=False)
    before = {path.name: path.read_bytes() for path in (folder / "units").iterdir()}
    run_backbone_study(study(), folder, progress=False)
    assert all((folder / "units" / name).read_bytes() == made for name, made in before.items()), "those still count"
    return folder


@pytest.fixture(scope="module")
def makers():
    block = make_block(study(), "planted", (0, 1), None, lambda stage, done, total: None)
    return BackboneArms(study(), "planted", block)


def test_policies_have_rows_in_the_same_tables(finished):
    rows = [row for row in read_table(finished, "runs") if row["optimiser"] == "ppo"]
    wanted = [(seed, arm) for seed in (0, 1) for arm in ("dense", "members")]
    assert [(row["seed"], row["arm"]) for row in rows] == wanted
    assert all(math.isfinite(row[name]) for row in rows for name in ("gold_at_kl", "gold_end", "kl_end", "fit_a"))
    assert all(math.isnan(row["accuracy"]) for row in rows)
    curves = [row for row in read_table(finished, "curves") if row["optimiser"] == "ppo"]
    assert [row["step"] for row in curves] == [0, 1, 2] * 4
    assert all(abs(row["kl"]) < 1e-9 if row["step"] == 0 else row["kl"] > 0 for row in curves)
    timings = [row for row in read_table(finished, "timings") if row["optimiser"] == "ppo"]
    assert len(timings) == 4 and all(row["seconds"] > 0 for row in timings)


def test_the_report_compares_and_draws_them(finished):
    files = write_report(finished)
    assert "ppo.png" in {path.name for path in files}
    with open(finished / "comparisons.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["optimiser"] == "ppo"]
    assert (row["seeds"], row["missing"]) == ("2", "0"), "seeds that PPO isn't run in are not missing"
    paths = study_tables(finished)["paths"]
    assert [row[:3] for row in paths.rows] == [(arm, "planted", "PPO") for arm in ("dense", "members")]
    assert "Policies trained against them" in (finished / "report.html").read_text()


def test_every_arm_under_ppo_is_drawn_in_a_look_of_its_own():
    """Also those that no primary comparison names, and where the primary ones have more arms than there are looks."""
    names = [f"arm{i}" for i in range(10)]
    one = {"kind": "dense", "rates": [1e-2], "steps": [3]}
    shown = Shown.of(
        study(
            arms=dict.fromkeys(names, one),
            chosen={"planted": dict.fromkeys(names, {"steps": 3, "rate": 1e-2})},
            ppo={**PPO, "arms": [names[0], names[3], names[7], names[9]]},
            primaries=[{"arm": name, "against": "arm0"} for name in names[1:9]],
            secondary=[],
        )
    )
    key = {"regime": "planted", "seed": 0, "optimiser": "ppo"}
    curves = [
        {**key, "arm": names[i], "kl": float(step), "gold": 0.0, "proxy": 0.0} for i in (9, 7, 3, 0) for step in (0, 1)
    ]
    lines = over_optimisation(shown, curves, "ppo").axes[0].lines[:-1]  # the last one is the fixed KL
    assert len(lines) == 4 and len({(line.get_color(), line.get_marker()) for line in lines}) == 4


def rows_of(folder, table):
    """PPO's rows, exactly."""
    return [repr(row) for row in read_table(folder, table) if row["optimiser"] == "ppo"]


def test_blocks_and_interruptions_leave_no_trace(finished, tmp_path):
    made = {name: rows_of(finished, name) for name in ("runs", "curves")}
    for block in (2, 3):
        folder = tmp_path / str(block)
        run_backbone_study(study(block=block), folder, ("dense", "members"), ("ppo",), progress=False)
        units = sorted(path.name for path in (folder / "units").iterdir())
        assert units == [f"planted-{arm}-0-2-ppo.json" for arm in ("dense", "members")]
        assert rows_of(folder, "runs") == made["runs"] and len(read_table(folder, "runs")) == 4
        (folder / "units" / units[0]).unlink()
        run_backbone_study(study(block=block), folder, ("dense",), progress=False)
        dense = [row for row in made["curves"] if "'dense'" in row]
        assert rows_of(folder, "curves") == dense and len(read_table(folder, "runs")) == 3 + 2


def test_best_of_n_does_not_depend_on_ppo_nor_ppo_on_other_arms():
    plain, with_ppo = study(ppo=None, secondary=[]), study()
    more = study(ppo={**PPO, "arms": ["dense", "runs", "members"], "seeds": 3})
    longer = study(ppo={**PPO, "settings": {**PPO["settings"], "steps": 3}})
    for arm in ARMS:
        assert plain.fingerprint("planted", arm) == with_ppo.fingerprint("planted", arm)
        under_ppo = with_ppo.fingerprint("planted", arm, "ppo")
        assert under_ppo == more.fingerprint("planted", arm, "ppo") != longer.fingerprint("planted", arm, "ppo")
        assert under_ppo != plain.fingerprint("planted", arm)


def test_an_unmoved_policy_answers_as_its_backbone_and_is_judged_by_the_task(makers):
    """A rate too small to matter: no divergence, the backbone's answers, the task's gold, the arm's own proxy."""
    block, models = makers.block, makers.make("dense", Variation(3, 1e-2))
    settings = dataclasses.replace(study().ppo.settings, learning_rate=1e-5, normalise_reward=False)
    config = dataclasses.replace(study().ppo, settings=settings)
    path = policy_path(block, 1, reward_of(models, makers.member_scores(models), 1), config, study().measure)
    assert all(0 <= row["kl"] + 1e-9 < 1e-5 for row in path["curve"])

    task, start = block.tasks[1], start_of(block, 1, 14)
    generator = torch.Generator().manual_seed(derive(1, "ppo"))
    rounds = [torch.randperm(len(task.prompts), generator=generator) for _ in range(-(-16 // len(task.prompts)))]
    answers = sample(start, task.prompts.select(torch.cat(rounds)[:16]), generator).sequences
    gold = (task.gold(answers) - task.policy.gold.mean()) / task.policy.gold.std()
    first = path["curve"][0]
    assert first["gold"] == pytest.approx(gold.mean().item())
    assert first["shortcut"] == task.shortcut_of(answers).mean().item()
    stock = block.network.to_stock(models.parameters, 1)
    assert first["proxy"] == pytest.approx(rewards_of(stock, answers, 16).mean().item(), abs=1e-5)

    corpus = block.policy.take(torch.arange(2), torch.arange(8).expand(2, -1))
    logits = start.network(input_ids=corpus["tokens"][1]).logits[:, 1:-1]
    counted = torch.arange(2, corpus["tokens"].shape[2]) < corpus["lengths"][1][:, None]
    loss = torch.nn.functional.cross_entropy(logits[counted], corpus["tokens"][1][:, 2:][counted])
    torch.testing.assert_close(loss, block.network.next_token_loss(block.language_models, corpus)[1])


def test_a_combined_reward_is_the_combination_by_hand(makers):
    block = makers.block
    runs, *others = (makers.make(arm, Variation(3, 1e-2)) for arm in ("runs", "members", "mixture"))
    new, known = (answers_of(answers, 1) for answers in (block.test.chosen, reference(block.unlabelled)))
    parts = []
    for model in runs.members.values():
        stock = block.network.to_stock(model.parameters, 1)
        scores, on_known = (rewards_of(stock, answers, 64) for answers in (new, known))
        parts.append(((scores - on_known.mean()) / on_known.std(), on_known.std()))
    normal, unit = (torch.stack(column) for column in zip(*parts, strict=True))
    found = reward_of(runs, makers.member_scores(runs), 1)(new)
    torch.testing.assert_close(found, unit.mean() * normal.mean(0), rtol=0, atol=1e-6)

    for models in others:  # as under best-of-n
        found = reward_of(models, makers.member_scores(models), 1)(new)
        torch.testing.assert_close(found, makers.scores(models).sets["test chosen"][1], rtol=0, atol=1e-6)


def answers_of(answers: Answers, seed: int) -> Sequences:
    return Sequences(answers.features["tokens"][seed], answers.lengths[seed], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {**PPO, "arms": ["luck"]}}, "`ppo.arms` must be of arms, dense, .*, got 'luck'"),
        ({"ppo": {**PPO, "seeds": 0}}, "`seeds` must be at least 1, got 0"),
        ({"ppo": {**PPO, "answer_tokens": 31}}, "`ppo.answer_tokens` must be at most model.longest - 2 = 30, .*got 31"),
        ({"measure": {"ppo_window": 5}}, "`measure.ppo_window` must be at most the 3 points of a path, got 5"),
        (
            {"regimes": {"planted": {"task": {"kind": "ratings"}}}, "chosen": {}},
            "`ppo` needs regimes of kind language, .*; the regime 'planted' isn't",
        ),
        (
            {"secondary": [{"arm": "runs", "against": "dense", "optimiser": "ppo"}]},
            "a comparison under ppo needs 'runs' to be run under it",
        ),
    ],
)
def test_what_ppo_cannot_be_run_on_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        study(**changes)
