"""Estimates with 95 % intervals: jackknife over batches, score intervals over images, differences that stay paired, means over seeds.

    deviation of batch b:  d_b = p_b - mean(p),  p_b = B value - (B - 1) value_without_b      (Tukey's pseudo-values)
    over B batches:        value -+ t sqrt( sum_b d_b^2 / (B (B - 1)) ),  degrees of freedom B - 1
    over N images:         the score interval of a mean, see `share`
    over S seeds:          either of them, and the t interval of the seeds' values, in quadrature  (Howe 1974)

A bootstrap over few batches has too low a coverage (5 batches: 83 %, 12: 90 %); the jackknife has 94 to 96 %, see docs/decisions/0010.
For CKA, whole batches are left out, because leaving out images would invalidate the U-statistic of a batch. An accuracy is a mean over
images: differences of accuracies are paired image by image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit
from scipy.stats import binomtest

FEWEST_BATCHES = 5  # least number of batches for an interval


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value with the data for its interval.

    Attributes:
        deviations: (B,) deviations of the pseudo-values from their mean, per batch, which estimates on the same batches share; for an
            accuracy per image, see `share`. NaN if there are too few batches.
        degrees: degrees of freedom of the variance over batches.
        bounds: for an accuracy or a difference of accuracies, the least and largest value of an image, see `share`; else None.
        spread: half width of the 95 % interval over seeds; 0 with one seed.
    """

    value: float
    deviations: np.ndarray
    degrees: float = math.inf
    bounds: tuple[float, float] | None = None
    spread: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval; NaN if there is none."""
        count = len(self.deviations)
        if count < FEWEST_BATCHES:
            return math.nan, math.nan
        if self.bounds:
            low, high = _score_interval(self.value + self.deviations, self.bounds)
        else:
            half = float(stdtrit(self.degrees, 0.975)) * math.sqrt(float(np.square(self.deviations).sum()) / (count * (count - 1)))
            low, high = self.value - half, self.value + half
        return self.value - math.hypot(self.value - low, self.spread), self.value + math.hypot(high - self.value, self.spread)


def _score_interval(values: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
    """Ends of the range of means m that a score test does not reject, see `share`."""
    seen, counts = np.unique(values.round(12), return_counts=True)
    weights, least, largest = counts / len(values), min(bounds[0], seen[0]), max(bounds[1], seen[-1])
    return -_upper_end(-seen, weights, -least, count=len(values)), _upper_end(seen, weights, largest, count=len(values))


def _upper_end(values: np.ndarray, weights: np.ndarray, largest: float, *, count: int) -> float:
    """Upper end of the score interval for values v_k <= `largest` with shares w_k.

    The most likely distribution of mean m has p_k = w_k / (1 + a (v_k - m)), and the rest of the probability at `largest`. Its variance is
    (mean - m) / a, so at the end of the interval a = -c / (m - mean), c = z^2 / N, and one equation is left: sum_k p_k (v_k - m) = 0.
    """
    mean, c = float(weights @ values), float(ndtri(0.975)) ** 2 / count
    if largest - mean < 1e-12:
        return largest
    first = (mean + c * largest) / (1 + c)  # below this, a p_k would be negative

    def first_moment(m: float) -> float:
        return float((weights * (values - m) / (1 - c * (values - m) / (m - mean))).sum())

    start = first + 1e-12 * (largest - first)  # at `first` itself, a value of `largest` would divide by 0
    return first if first_moment(start) <= 0 else float(brentq(first_moment, start, largest))


def jackknife(value: float, without: np.ndarray, sizes: Sequence[int]) -> Estimate:
    """Jackknife estimate with the value `value`, which is `without[b]` if batch b is left out.

    Args:
        sizes: number of images in each batch. A batch of n has weight n (n - 3) in sums of HSIC_1; the degrees of freedom are those of
            the equivalent number of equal batches, so that a small last batch does not count fully.
    """
    batches, weights = len(without), np.array([size * (size - 3) for size in sizes], dtype=float)
    pseudo = batches * value - (batches - 1) * without
    return Estimate(value, pseudo - pseudo.mean(), float(weights.sum() ** 2 / np.square(weights).sum()) - 1)


def share(right: np.ndarray) -> Estimate:
    """Estimate of an accuracy that keeps the value of every image, so that `difference` of two accuracies, or differences, is paired.

        values (N,), e.g. v_i = first_i - second_i;  interval: all m with (mean(v) - m)^2 <= z^2 variance(m) / N

    variance(m) is that of the most likely distribution of mean m (Owen 1988, Biometrika 75:237) on the observed values and on `bounds`,
    which are 0 and 1 for an accuracy, -1 and 1 for a difference, even if no image has them: so two models that agree on every image do not
    get the interval 0 -+ 0. For one accuracy this is Wilson's interval (1927), for the difference of two models Tango's (1998, Stat. Med.
    17:891); the same rule applies to differences of differences and means over seeds.

    Coverage by docs/decisions/0010-coverage.py, 100 to 1000 images, accuracies .4 to .99, correlations 0 to .8: 95.3 % on average, at least
    94.2 %, above 97 % only if the models differ on fewer than three images.

    Args:
        right: (N,) bool, whether each image is classified correctly, in the order that all models share.
    """
    return Estimate(float(right.mean()), right - right.mean(), bounds=(0.0, 1.0))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Paired difference first - second, in which errors shared by both in a batch, or on an image, cancel.

    Raises:
        ValueError: they were measured on different numbers of batches.
    """
    if len(first.deviations) != len(second.deviations):
        raise ValueError(f"{len(first.deviations)} batches cannot be paired with {len(second.deviations)}")
    return Estimate(
        first.value - second.value,
        first.deviations - second.deviations,
        min(first.degrees, second.degrees),
        (-1.0, 1.0) if first.bounds and second.bounds else None,
        math.hypot(first.spread, second.spread),
    )


def mcnemar(default: np.ndarray, winner: np.ndarray) -> dict[str, Any]:
    """Compare two attacks on the same images: numbers of images that only one breaks, and the two-sided p of McNemar's exact test (1947).

    `difference`, with the ends of its 95 % interval, is the accuracy under the winner minus that under the default, see `share`.

    Args:
        default, winner: (N,) bool, images that are still correct under each attack.
    """
    winner_only, default_only = int((default & ~winner).sum()), int((~default & winner).sum())
    p = binomtest(default_only, default_only + winner_only).pvalue if default_only + winner_only else 1.0
    found = difference(share(winner), share(default))
    low, high = found.interval
    counts = {"broken_by_winner_only": winner_only, "broken_by_default_only": default_only, "p": float(p)}
    return counts | {"difference": found.value, "low": low, "high": high}


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over S seeds, with the t interval of their values (S - 1 degrees of freedom) widened by the error that they share.

    All seeds use the same test images, so the error over batches or images does not average out. Deviations are averaged, which counts a
    seed's own part of the error twice, so that the interval is rather too wide. With one seed, the interval does not cover the variation
    between trainings.

    Raises:
        ValueError: they were measured on different numbers of batches.
    """
    if len(estimates) == 1:
        return estimates[0]
    if len({len(each.deviations) for each in estimates}) != 1:
        raise ValueError("seeds measured on different numbers of batches cannot be averaged")
    values = [each.value for each in estimates]
    return Estimate(
        float(np.mean(values)),
        np.mean([each.deviations for each in estimates], axis=0),
        min(each.degrees for each in estimates),
        estimates[0].bounds,
        float(stdtrit(len(values) - 1, 0.975)) * math.sqrt(float(np.var(values, ddof=1)) / len(values)),
    )
