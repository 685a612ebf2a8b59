"""Calibration by hand: bins, ECE, the loss, and the temperature against a plain search."""

import math

import numpy as np
import pytest

from ummrm.evaluation.calibration import BINS, calibration, fit_temperature, reliability


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loss(differences, temperature=1.0):
    return sum(math.log1p(math.exp(-d / temperature)) for d in differences) / len(differences)


def test_the_table_and_ece_by_hand():
    differences = [0.1, -0.15, 2.0, 2.1, -2.05, 0.0, 9.0, -50.0]
    found = reliability(np.array(differences))
    bins = {}
    for d in differences:
        confidence = sigmoid(abs(d))
        bins.setdefault(min(int((confidence - 0.5) * 2 * BINS), BINS - 1), []).append(
            (confidence, (d > 0) + (d == 0) / 2)
        )
    ece = sum(abs(sum(right for _, right in rows) - sum(c for c, _ in rows)) for rows in bins.values()) / 8
    assert found.ece == pytest.approx(ece) and ece > 0.1
    for b, one in enumerate(found.bins):
        rows = bins.get(b, [])
        assert one.accuracy.count == len(rows) and (one.low, one.high) == pytest.approx((0.5 + b / 20, 0.55 + b / 20))
        if rows:
            assert one.confidence == pytest.approx(sum(c for c, _ in rows) / len(rows))
            assert one.accuracy.value == pytest.approx(sum(r for _, r in rows) / len(rows))
        else:
            assert math.isnan(one.confidence)
    assert found.loss == pytest.approx(loss(differences)) and found.count == 8


def test_a_model_whose_confidence_is_true_has_the_ece_that_noise_gives():
    generator = np.random.default_rng(1)
    size = np.abs(generator.normal(0, 2, 4000))
    right = generator.random(4000) < 1 / (1 + np.exp(-size))
    true = reliability(np.where(right, size, -size))
    assert true.ece < 2 * true.ece_if_calibrated < 0.05
    sure = reliability(np.where(right, size, -size) * 3)
    assert sure.ece > 5 * sure.ece_if_calibrated
    few = reliability(np.where(right, size, -size)[:40])
    assert few.ece_if_calibrated > 3 * true.ece_if_calibrated


def test_the_temperature_is_where_the_loss_is_least():
    generator = np.random.default_rng(2)
    size = np.abs(generator.normal(0, 2, 3000))
    right = generator.random(3000) < 1 / (1 + np.exp(-size))
    differences = np.where(right, size, -size) * 2.5
    temperature, why = fit_temperature(differences)
    assert why == "" and temperature == pytest.approx(2.5, rel=0.1)
    assert loss(differences, temperature) < min(loss(differences, temperature * f) for f in (0.98, 1.02))
    assert fit_temperature(differences * 1e6)[0] == pytest.approx(temperature * 1e6, rel=1e-6)


@pytest.mark.parametrize(
    ("differences", "why"),
    [
        ([], "no two rewards differ"),
        ([0, 0], "no two rewards differ"),
        ([1, -3], "a coin"),
        ([1, 2], "no pair is wrong"),
    ],
)
def test_there_may_be_no_temperature(differences, why):
    found, reason = fit_temperature(np.array(differences, dtype=float))
    assert found is None and why in reason


def test_a_prompt_is_in_one_half_and_the_other_half_is_reported():
    generator = np.random.default_rng(3)
    differences = generator.normal(0.5, 1, 400)
    keys = [f"prompt {i // 4}" for i in range(400)]
    found = calibration(differences, keys)
    assert found.fitted_on % 4 == 0 and 120 < found.fitted_on < 280
    assert found.before.count == found.after.count == 400 - found.fitted_on
    assert found.all.count == 400 and found.after.loss != found.before.loss
    assert calibration(differences, keys) == found != calibration(differences, keys, seed=1)
    one = calibration(np.array([0.3]), ["p"])
    assert one.temperature is None and one.why_none and one.all.count == 1
    assert (one.before is None) == (one.fitted_on == 1)


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="must be finite numbers, got 1 that are not"):
        reliability(np.array([1.0, math.nan]))
    with pytest.raises(ValueError, match="must be finite numbers, got none"):
        reliability(np.array([]))
