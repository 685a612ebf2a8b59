"""The arms: what they are made of, what they cost; and what is measured of experts."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny_study import tiny_study

from lab.arms import Arms, average_weights
from lab.costs import forward_flops, merging_flops
from lab.demo.measure import rewards_of
from lab.specialisation import (
    SHARED,
    ablated,
    ablation_costs,
    expert_distances,
    first_expert_counts,
    mutual_information,
)
from lab.tasks import PolicySamples, Sequences
from lab.units import curve_values, policy_accuracies
from ummrm import MergeConfig, prepare_merge, upcycle

EXTRA = {
    "flops": {"kind": "dense_longer", "budget": "flops"},
    "mean": {"kind": "ensemble"},
    "warm": {"kind": "weight_average"},
    "uniform": {"kind": "merged", "alpha": "uniform"},
    "shared_only": {"kind": "merged", "alpha": "uniform", "shared_share": 1.0},
    "one_of_three": {"kind": "moe", "upcycle": {"num_experts_per_tok": 1}},
    "early": {"kind": "merged", "dense": {"steps": 1}},
}


@pytest.fixture(scope="module")
def arms():
    counts = {}
    made = Arms(tiny_study(EXTRA), "planted", 3, on_step=lambda stage, done, total: counts.__setitem__(stage, total))
    made.counts = counts
    return made


def test_the_control_takes_as_many_steps_as_mixture_and_merge_weights(arms):
    study = arms.study
    assert arms.equal_steps(study.resolve("dense_longer"), "steps").steps == study.moe.steps + study.alpha.steps == 6
    arms.make("dense_longer")
    arms.make("merged")
    assert arms.counts["dense on 0"] == 6 and arms.counts["mixture"] == 4 and arms.counts["merge weights"] == 2


def test_an_arm_may_start_from_a_dense_model_of_its_own(arms):
    early, merged, dense = (arms.make(name) for name in ("early", "merged", "dense"))
    saved = merged.training_flops - early.training_flops
    assert saved == pytest.approx(dense.training_flops * 4 / 5), "one step of five"
    study = arms.study
    assert study.fingerprint("planted", "early", "best_of_n") != study.fingerprint("planted", "merged", "best_of_n")


def test_equal_flops_are_equal_to_a_step(arms):
    dense, merged, flops = (arms.make(name).training_flops for name in ("dense", "merged", "flops"))
    one_step = arms.make("dense_longer").training_flops - dense
    assert abs(flops - merged) <= one_step / 6
    assert flops > arms.make("dense_longer").training_flops


def test_forward_flops_are_those_of_the_matrices(arms):
    dense, h, i, length = arms.make("dense").models[0], 16, 24, 10.0
    layer = 4 * h * h + 3 * h * i
    assert forward_flops(dense, length) == 2 * (2 * layer + h) + 4 * length * h * 2
    mixture = arms.make("moe").models[0]
    moe_layer = 4 * h * h + (2 + 1) * 3 * h * i + 3 * h
    assert forward_flops(mixture, length) == 2 * (2 * moe_layer + h) + 4 * length * h * 2
    fewer = arms.make("one_of_three").models[0]
    assert forward_flops(mixture, length) - forward_flops(fewer, length) == 2 * 2 * 3 * h * i
    merging = prepare_merge(copy.deepcopy(mixture), MergeConfig())
    assert forward_flops(merging, length) == forward_flops(dense, length)
    assert merging_flops(merging, 5) == 6 * 5 * 2 * 4 * 3 * h * i


def test_merged_arms_are_dense_models_and_lambda_one_is_the_shared_expert(arms):
    dense, merged = arms.make("dense").models[0], arms.make("merged").models[0]
    assert type(merged) is type(dense) and merged.state_dict().keys() == dense.state_dict().keys()
    shared = arms.make("shared_only").models[0].model.layers[0].mlp
    experts = arms.make("moe").models[0].model.layers[0].mlp.shared_experts.tensors()
    assert torch.allclose(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]), experts["up"][0])
    assert torch.allclose(shared.down_proj.weight, experts["down"][0])
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, shared.up_proj.weight)


def test_an_ensemble_is_standard_on_its_reference_and_its_members_differ(arms):
    ensemble = arms.make("mean")
    each = [rewards_of(model, arms.reference, 64) for model in ensemble.models]
    assert not torch.allclose(each[0], each[1])
    normal = torch.stack([(s - mean) / std for s, (mean, std) in zip(each, ensemble.scales, strict=True)])
    assert normal.mean(1).abs().max() < 1e-9 and (normal.std(1) - 1).abs().max() < 1e-9
    assert torch.allclose(ensemble(arms.reference), normal.mean(0))
    assert ensemble.parameters == 2 * arms.make("dense").parameters


def test_ensembles_score_their_members_once(monkeypatch):
    study = tiny_study({"mean": {"kind": "ensemble"}, "worst": {"kind": "ensemble", "rule": "worst"}})
    arms, counts = Arms(study, "planted", 3), []
    monkeypatch.setattr("lab.arms.rewards_of", lambda *inputs: counts.append(inputs) or rewards_of(*inputs))
    first, second = arms.make("mean"), arms.make("worst")
    answers, other = arms.task.policy.sequences, arms.task.train.chosen
    found = first(answers), second(answers)
    assert len(counts) == 4, "two members over the reference and the policy's answers"
    normal = torch.stack(
        [(rewards_of(m, answers, 256) - mean) / std for m, (mean, std) in zip(first.models, first.scales, strict=True)]
    )
    assert torch.equal(found[0], normal.mean(0)) and torch.equal(found[1], normal.min(0).values)
    first(other), first(other)
    assert len(counts) == 8, "passing sequences are not kept"


def test_the_weight_average_is_of_runs_from_one_dense_model(arms):
    stages = arms.study.resolve("warm")
    members = [arms.longer(stages, arms.equal_steps(stages, "steps"), i).model for i in range(2)]
    names = dict(members[0].named_parameters())
    other, averaged = dict(members[1].named_parameters()), dict(arms.make("warm").models[0].named_parameters())
    assert any(not torch.equal(names[n], other[n]) for n in names)
    for name in names:
        assert torch.allclose(averaged[name], (names[name] + other[name]) / 2, atol=1e-7), name
    assert torch.equal(average_weights([members[0]] * 3).score.weight, members[0].score.weight)
    start, one = arms.make("dense").training_flops, arms.make("dense_longer").training_flops
    assert arms.make("warm").training_flops == pytest.approx(start + 2 * (one - start))


def test_stages_come_back_from_their_files_bit_for_bit(tmp_path):
    study = tiny_study()
    first = Arms(study, "planted", 0, tmp_path)
    scores = first.make("merged")(first.reference)
    steps = []
    again = Arms(study, "planted", 0, tmp_path, on_step=lambda *event: steps.append(event))
    merged = again.make("merged")
    assert torch.equal(merged(again.reference), scores) and steps == []
    assert merged.record == first.make("merged").record
    assert again.make("merged").training_flops == first.make("merged").training_flops


def test_experts_are_as_far_from_each_other_and_from_their_start_as_they_were_moved(arms):
    start = upcycle(arms.make("dense").models[0], arms.study.upcycle, copy=True)
    moved = copy.deepcopy(start)
    with torch.no_grad():
        for tensor in moved.model.layers[1].mlp.experts.tensors().values():
            tensor *= torch.tensor([1.0, 1.1, 1.2]).view(3, 1, 1)
    rows = {(row["layer"], row["measure"]): row["value"] for row in expert_distances(moved, start)}
    spread = math.sqrt((0.1**2 + 0.1**2) / 3)
    assert rows["layer 0", "expert_travel"] == rows["layer 0", "expert_spread"] == 0
    assert rows["layer 1", "expert_travel"] == pytest.approx(0.1, rel=1e-5)
    assert rows["layer 1", "expert_spread"] == pytest.approx(spread, rel=1e-5)


def test_merged_models_report_on_their_mixtures_where_asked(arms):
    study = tiny_study({"noisy": {"kind": "merged", "upcycle": {"expert_noise": 0.5}}})
    study = dataclasses.replace(study, measure=dataclasses.replace(study.measure, mixtures=True))
    asked = Arms(study, "planted", 3)
    merged, noisy, moe = (asked.make(name) for name in ("merged", "noisy", "moe"))
    assert torch.equal(merged(asked.reference), arms.make("merged")(arms.reference)), "measuring changes nothing"
    rows = [
        row
        for row in moe.record["specialisation"]
        if row["step"] == study.moe.steps and row["measure"] != "ablation_cost"
    ]
    assert merged.record["specialisation"][: len(rows)] == rows and rows
    travel, spread = (
        [[row["value"] for row in m.record["specialisation"] if row["measure"] == name] for m in (merged, noisy)]
        for name in ("expert_travel", "expert_spread")
    )
    assert all(0 < value < 0.5 for value in travel[0]) and len(travel[0]) == 2
    assert all(value > 0.4 > own > 0 for value, own in zip(spread[1], spread[0], strict=True)), "noise counts as spread"


@pytest.mark.parametrize("first", ["merged", "warm", "flops"])
def test_an_arm_is_the_same_whichever_was_made_before_it(arms, first, tmp_path):
    """Made alone, after others, or from a dense model that was kept in a file: the random numbers are its own."""
    alone = Arms(tiny_study(EXTRA), "planted", 3)
    expected = alone.make(first)(alone.reference)
    arms.make("dense")
    assert torch.equal(arms.make(first)(alone.reference), expected)
    Arms(tiny_study(EXTRA), "planted", 3, tmp_path).make("dense")
    resumed = Arms(tiny_study(EXTRA), "planted", 3, tmp_path)
    assert torch.equal(resumed.make(first)(alone.reference), expected)


def test_mutual_information_of_known_tables():
    regimes = torch.tensor([0, 0, 1, 1])
    sure = torch.tensor([[4.0, 0], [2, 0], [0, 3], [0, 3]])
    assert mutual_information(sure, regimes, 2) == pytest.approx(1.0)
    assert mutual_information(torch.ones(4, 2), regimes, 2) == pytest.approx(0.0, abs=1e-12)
    p = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    expected = 1 - (-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert mutual_information(p, torch.tensor([0, 1]), 2) == pytest.approx(expected)


def test_first_experts_are_counted_for_each_sequence(arms):
    moe = arms.make("moe").models[0]
    sequences = arms.task.test.chosen.select(slice(0, 6))
    counts = first_expert_counts(moe, sequences, batch_size=4)
    for table in counts.values():
        assert table.sum(1).tolist() == sequences.lengths.tolist() and table.shape == (6, 3)


def test_an_ablated_expert_gives_its_weight_away(arms):
    moe = arms.make("moe").models[0]
    seen = {}
    router = moe.model.layers[0].mlp.router
    sequences = arms.task.test.chosen.select(slice(0, 4))
    for expert in (0, SHARED):
        with ablated(moe, expert):
            handle = router.register_forward_hook(lambda m, a, out, e=expert: seen.__setitem__(e, out))
            rewards_of(moe, sequences, 4)
            handle.remove()
    one, shared = seen[0], seen[SHARED]
    live = one.expert_indices[:, 0] >= 0
    for out in (one, shared):
        assert torch.allclose((out.shared_weight + out.routed_weights.sum(1)), torch.ones(len(live)), atol=1e-6)
    assert (one.routed_weights[one.expert_indices == 0] == 0).all() and (one.expert_indices == 0).any()
    assert (shared.shared_weight[live] == 0).all() and (shared.shared_weight[~live] == 1).all()
    pairs = arms.task.test.select(slice(0, 8))
    costs = ablation_costs(moe, pairs, arms.task.regime_of(pairs.chosen), 2, 8)
    assert set(costs) == {SHARED, 0, 1, 2} and any(abs(c) > 0 for row in costs.values() for c in row)


def test_what_is_read_off_a_curve():
    rows = [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4.0, 0.5, 2.0), (9.0, -1.0, 3.0)]
    curve = [{"kl": k, "gold": g, "proxy": p, "shortcut": p} for k, g, p in rows]
    found = curve_values(curve, 2.25, 1)
    assert found["gold_at_kl"] == pytest.approx(0.75) and found["gold_peak"] == 1.0 and found["kl_peak"] == 1.0
    assert found["drop_from_peak"] == 2.0 and found["proxy_gold_gap"] == 4.0 and found["shortcut_end"] == 3.0
    assert math.isnan(curve_values(curve, 10.0, 1)["gold_at_kl"])


def test_accuracy_on_the_tail_looks_at_pairs_beyond_training():
    gold = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double()
    shortcut = torch.tensor([[0.0, 0.0, 5.0, 0.0]]).double()
    samples = PolicySamples(Sequences.from_lists([[1]] * 4, 0), gold, shortcut)
    right_in_tail = policy_accuracies(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).double(), samples, 3.0)
    assert right_in_tail == {"accuracy_policy": 0.5, "accuracy_tail": 1.0}
    assert math.isnan(policy_accuracies(gold, samples, 9.0)["accuracy_tail"])
