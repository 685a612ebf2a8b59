"""Whether sigmoid(difference of rewards) is the probability that it is trained to be.

Under Bradley and Terry's model, which reward models are trained by, a difference d says that the first answer is better
with probability sigmoid(d). Here the confidence in the answer with the higher reward, sigmoid(|d|), is held against how
often that answer is the chosen one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from .intervals import Estimate, wilson

BINS = 10
_SIMULATED = 1000


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence.

    Attributes:
        low: least confidence, from 0.5.
        high: greatest; only the last bin holds it.
        confidence: mean of its pairs; NaN if it has none.
        accuracy: how often the answer with the higher reward is the chosen one.
    """

    low: float
    high: float
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Reliability:
    """Calibration on some pairs.

    Attributes:
        bins: `BINS` of equal width over confidences from 0.5 to 1.
        ece: expected calibration error, the bins' |accuracy - confidence| weighted by pairs; 0 is best.
        ece_if_calibrated: what it would be on average if every confidence were true: noise of so few pairs, no error.
        loss: mean of -log sigmoid(d), in nats; 0.693 is that of a coin.
        count: pairs.
    """

    bins: list[Bin]
    ece: float
    ece_if_calibrated: float
    loss: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Of one model.

    Attributes:
        all: every pair, as the model is.
        temperature: what rewards are to be divided by so that the loss on one half of the pairs is least; None where no
            temperature does, which `why_none` explains.
        why_none: in words, or "".
        fitted_on: pairs of that half.
        before: the other half, as the model is; None if it is empty.
        after: the other half, rewards divided by the temperature; None without one.
    """

    all: Reliability
    temperature: float | None
    why_none: str
    fitted_on: int
    before: Reliability | None
    after: Reliability | None


def reliability(differences: np.ndarray, seed: int = 0) -> Reliability:
    """The reliability table and what follows from it.

    Args:
        differences: fp64 [N], reward of the chosen answer less that of the rejected one, finite, N at least 1.
        seed: of the simulated outcomes.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    if not len(differences) or not np.isfinite(differences).all():
        what = "none" if not len(differences) else f"{int((~np.isfinite(differences)).sum())} that are not"
        raise ValueError(f"`differences` must be finite numbers, got {what}; leave such pairs out.")
    confidence = special.expit(np.abs(differences))
    right = (np.sign(differences) + 1) / 2
    edges = np.linspace(0.5, 1.0, BINS + 1)
    index = np.minimum((BINS * (confidence - 0.5) / 0.5).astype(int), BINS - 1)
    counts = np.bincount(index, minlength=BINS)
    sums, hits = (np.bincount(index, values, BINS) for values in (confidence, right))
    bins = [
        Bin(
            float(edges[b]),
            float(edges[b + 1]),
            float(sums[b] / counts[b]) if counts[b] else math.nan,
            wilson(float(hits[b]), int(counts[b])),
        )
        for b in range(BINS)
    ]
    generator = np.random.default_rng(seed)
    draws = generator.binomial(counts, np.clip(sums / np.maximum(counts, 1), 0, 1), (_SIMULATED, BINS))
    return Reliability(
        bins,
        float(np.abs(hits - sums).sum() / len(differences)),
        float(np.abs(draws - sums).sum(1).mean() / len(differences)),
        float(np.logaddexp(0, -differences).mean()),
        len(differences),
    )


def fit_temperature(differences: np.ndarray) -> tuple[float | None, str]:
    """The temperature T at which the mean of -log sigmoid(d / T) is least; the loss is convex in 1/T.

    Args:
        differences: fp64 [N], chosen less rejected.

    Returns:
        (T, ""), or (None, why there is none).
    """
    if not len(differences) or not np.any(differences):
        return None, "no two rewards differ"
    if differences.mean() <= 0:
        return None, "the rejected answers get the higher rewards on average, so that a coin is the better guess"
    if differences.min() >= 0:
        return None, "no pair is wrong, so that the loss falls without end as the temperature goes to 0"
    # in units in which differences are about 1
    scale = float(np.abs(differences).mean())
    units = differences / scale

    def slope(inverse: float) -> float:
        return float(-(units * special.expit(-inverse * units)).mean())

    upper = 1.0
    while slope(upper) < 0:
        upper *= 2
    return scale / float(optimize.brentq(slope, 0.0, upper, xtol=1e-12)), ""


def calibration(differences: np.ndarray, keys: Sequence[str], seed: int = 0) -> Calibration:
    """Calibration of one model on pairs; the temperature is fitted on the half of the prompts that the seed draws.

    Args:
        differences: fp64 [N], finite, N at least 1.
        keys: [N], the same for pairs of one prompt, which so are in one half.
        seed: of the halves.
    """
    draws = [hashlib.sha256(f"{seed}\0{key}".encode(errors="surrogatepass")).digest()[0] for key in keys]
    first = np.array(draws, dtype=np.int64) < 128
    fitted, held_out = differences[first], differences[~first]
    temperature, why = fit_temperature(fitted)
    if not len(fitted):
        why = "there are too few prompts to fit one"
    before = reliability(held_out, seed) if len(held_out) else None
    after = reliability(held_out / temperature, seed) if len(held_out) and temperature is not None else None
    return Calibration(reliability(differences, seed), temperature, why, len(fitted), before, after)
