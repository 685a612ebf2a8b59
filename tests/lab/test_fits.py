"""Over-optimisation fits against known curves; readings at a fixed divergence; the drop from the peak."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from lab.fits import drop_from_peak, fit_best_of_n, fit_rl, gold_at_kl, smoothed, value_at_kl

FORMS = {
    fit_best_of_n: lambda d, a, b: d * (a - b * d),
    fit_rl: lambda d, a, b: d * (a - b * math.log(d)) if d > 0 else 0.0,
}


@pytest.mark.parametrize("fit", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("a", "b"), [(2.0, 0.3), (0.7, -0.2), (-1.0, 1.5)])
def test_a_noiseless_curve_gives_back_its_coefficients(fit, a, b):
    d = [0.0, 0.1, 0.5, 1.0, 1.7, 2.6, 4.0]
    result = fit(d, [FORMS[fit](x, a, b) for x in d])
    assert tuple(result) == pytest.approx((a, b, 1.0))


@pytest.mark.parametrize("fit", FORMS, ids=lambda f: f.__name__)
def test_noise_moves_the_coefficients_by_their_standard_error_and_lowers_r2(fit):
    random = np.random.default_rng(7)
    d, a, b, noise = np.linspace(0.05, 4, 60), 2.0, 0.4, 0.2
    clean = np.array([FORMS[fit](x, a, b) for x in d])
    design = np.stack([d, clean - a * d], axis=1) / [1, b]
    error = noise * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    fits = [fit(d, clean + noise * random.standard_normal(len(d))) for _ in range(200)]
    estimates = np.array([(f.a, f.b) for f in fits])
    assert np.abs(estimates.mean(0) - [a, b]) == pytest.approx([0, 0], abs=4 * error.max() / math.sqrt(200))
    assert estimates.std(0) == pytest.approx(error, rel=0.25)
    assert all(f.r2 < 1 for f in fits)


def test_r2_is_about_the_mean_and_negative_for_a_form_that_cannot_fit():
    assert fit_best_of_n([1, 2, 3], [5.0, 5.1, 5.0]).r2 < 0
    assert math.isnan(fit_best_of_n([1, 2, 3], [0.0, 0.0, 0.0]).r2)


@pytest.mark.parametrize(
    ("d", "y", "message"),
    [
        ([1, 2], [1, 2, 3], r"one length, got \[2\] and \[3\]"),
        ([1, 2, math.nan], [1, 2, 3], "must be finite"),
        ([-1, 2, 3], [1, 2, 3], "at least 0, got -1"),
        ([0, 2, 2], [1, 2, 3], "two different values above 0"),
    ],
)
def test_points_that_determine_no_curve_are_refused(d, y, message):
    for fit in FORMS:
        with pytest.raises(ValueError, match=message):
            fit(d, y)


def record(kl, gold):
    return SimpleNamespace(kl=kl, gold=gold)


def test_gold_at_kl_interpolates_in_the_square_root_at_the_first_crossing():
    path = [record(0, 1.0), record(1, 3.0), record(4, 5.0), record(1, -7.0), record(9, 0.0)]
    assert gold_at_kl(path, 0) == 1
    assert gold_at_kl(path, 1) == 3
    assert gold_at_kl(path, 2.25) == pytest.approx(4.0)  # sqrt 1.5, half way from 1 to 2
    assert gold_at_kl(path, 0.25) == pytest.approx(2.0)
    assert gold_at_kl(path, 6.25) == pytest.approx(-7 + 0.75 * 7)  # sqrt 2.5: the way from 1 to 3 is the only one


def test_a_path_that_never_gets_there_has_no_value():
    assert math.isnan(value_at_kl([0, 1, 4], [0, 1, 2], 4.1))
    assert math.isnan(value_at_kl([1, 4], [1, 2], 0.5))
    assert value_at_kl([-1e-9, 1], [5.0, 6.0], 0) == 5, "rounding below 0 is 0"


def test_windows_average_values_and_distances():
    assert smoothed([1, 2, 6, 0], 2) == [1.5, 4.0, 3.0]
    kls, values = [0, 4, 4, 16], [0.0, 2.0, 4.0, 8.0]  # distances 0, 2, 2, 4: means 1, 2, 3; values 1, 3, 6
    assert value_at_kl(kls, values, 2.25, window=2) == pytest.approx(2.0)
    assert drop_from_peak([0, 4, 2, 0, 2], window=2) == pytest.approx(2.0)
    for window in (0, 5):
        with pytest.raises(ValueError, match=f"`window` must be 1 to the number of points, 4, got {window}"):
            value_at_kl(kls, values, 1, window)


def test_drop_from_peak():
    assert drop_from_peak([1, 5, 3]) == 2
    assert drop_from_peak([1, 2, 3]) == 0


def test_bad_readings_are_refused():
    with pytest.raises(ValueError, match="`kl` must be at least 0, got -1"):
        value_at_kl([0, 1], [0, 1], -1)
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        value_at_kl([0, 1], [0, 1, 2], 1)
