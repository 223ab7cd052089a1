"""Scalars of a model's CKA matrices, with intervals by a block bootstrap over batches.

Whole batches are drawn with replacement, never images: an image drawn twice would break the U-statistic. The same
draws serve every model measured on the same batches, so differences between models are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from advml.similarity.cka import Key, Similarity

Matrices = np.ndarray  # (..., L, L)


def mean_off_diagonal(cka: Matrices) -> np.ndarray:
    """Redundancy: mean CKA of different layers. (..., L, L) -> (...)."""
    return _mean(cka, ~np.eye(cka.shape[-1], dtype=bool))


def long_range(cka: Matrices) -> np.ndarray:
    """Mean CKA of layers more than half the depth apart: |i - j| > L / 2, as |i - j| > 8 of 16 blocks."""
    places = np.arange(cka.shape[-1])
    return _mean(cka, np.abs(places[:, None] - places) > cka.shape[-1] / 2)


def effective_layers(cka: Matrices) -> np.ndarray:
    """exp of the Shannon entropy of the eigenvalues, divided by their sum: L for unrelated layers, 1 for copies.

    The estimate is unbiased, so eigenvalues near zero may come out negative; they count as zero.
    """
    if not np.isfinite(cka).all():
        return np.full(cka.shape[:-2], np.nan)
    values = np.clip(np.linalg.eigvalsh((cka + np.swapaxes(cka, -1, -2)) / 2), 0, None)
    shares = values / values.sum(-1, keepdims=True)
    return np.exp(-np.sum(np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0), axis=-1))


def diagonal_mean(cka: Matrices) -> np.ndarray:
    """Mean of the diagonal: of clean against adversarial inputs, how far the attack leaves layers alone."""
    return np.diagonal(cka, axis1=-2, axis2=-1).mean(-1)


def diagonal_last_quarter(cka: Matrices) -> np.ndarray:
    """The same over the last quarter of the layers (rounded up)."""
    return _last_quarter(np.diagonal(cka, axis1=-2, axis2=-1)).mean(-1)


def diagonal_first_quarter(cka: Matrices) -> np.ndarray:
    """The same over the first quarter of the layers (rounded up)."""
    return _last_quarter(np.diagonal(cka, axis1=-2, axis2=-1)[..., ::-1]).mean(-1)


def _last_quarter(diagonal: np.ndarray) -> np.ndarray:
    count = math.ceil(diagonal.shape[-1] / 4)
    return diagonal[..., -count:]


def _mean(cka: Matrices, chosen: np.ndarray) -> np.ndarray:
    return cka[..., chosen].mean(-1) if chosen.any() else np.full(cka.shape[:-2], np.nan)


@dataclass(frozen=True)
class Scalar:
    """One number of a matrix: CKA of the rows of `first` with those of `second`, both kinds of input."""

    of: Callable[[Matrices], np.ndarray]
    first: str = "clean"
    second: str = "clean"


ADVERSARIAL = {"first": "adversarial", "second": "adversarial"}
# Name of the metric, `cka/` in front -> what it is.
SCALARS: dict[str, Scalar] = {
    "redundancy": Scalar(mean_off_diagonal),
    "redundancy_adversarial": Scalar(mean_off_diagonal, **ADVERSARIAL),
    "long_range": Scalar(long_range),
    "long_range_adversarial": Scalar(long_range, **ADVERSARIAL),
    "effective_layers": Scalar(effective_layers),
    "effective_layers_adversarial": Scalar(effective_layers, **ADVERSARIAL),
    "clean_adversarial": Scalar(diagonal_mean, second="adversarial"),
    "clean_adversarial_last_quarter": Scalar(diagonal_last_quarter, second="adversarial"),
    "clean_adversarial_first_quarter": Scalar(diagonal_first_quarter, second="adversarial"),
}


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value, and the values of the bootstrap's draws (S,); empty where there is but one batch."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by percentiles; NaN without draws."""
        if not len(self.draws) or not np.isfinite(self.draws).all():
            return (float("nan"), float("nan"))
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return (float(low), float(high))


def draws(batches: int, *, number: int, seed: int) -> np.ndarray:
    """How often each batch is drawn, (number, batches); the same for the same arguments. None with fewer than 2 batches."""
    if batches < 2:
        return np.empty((0, batches))
    return np.random.default_rng(seed).multinomial(batches, np.full(batches, 1 / batches), size=number).astype(float)


def estimate(
    similarity: Similarity,
    scalar: Scalar,
    first: str,
    second: str,
    weights: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> Estimate:
    """A scalar of CKA between two models' layers (or one model's with itself).

    Args:
        first, second: names of models.
        weights: of `draws`.
        rows, columns: (L1,), (L2,) bool: the layers of each that count, in pairs; None: all. A pair with a dead layer never counts.
    """
    keys: tuple[Key, Key] = ((first, scalar.first), (second, scalar.second))
    whole = similarity.cka(*keys)
    chosen = [
        np.flatnonzero(np.ones(length, bool) if mask is None else mask) for length, mask in zip(whole.shape, (rows, columns), strict=True)
    ]
    alive = (similarity.norms[keys[0]].sum(0)[chosen[0]] > 0) & (similarity.norms[keys[1]].sum(0)[chosen[1]] > 0)
    place = np.ix_(chosen[0][alive], chosen[1][alive])
    if not alive.any():
        return Estimate(float("nan"), np.empty(0))
    drawn = [scalar.of(similarity.cka(*keys, weights=part)[:, place[0], place[1]]) for part in _parts(weights)]
    return Estimate(float(scalar.of(whole[place])), np.concatenate(drawn) if drawn else np.empty(0))


def _parts(weights: np.ndarray, *, size: int = 100) -> list[np.ndarray]:
    """Draws at a time: a matrix per draw would not fit for many layers."""
    return [weights[start : start + size] for start in range(0, len(weights), size)]


def rankme(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): exp of the entropy of the singular values of features (N, D), divided by their sum."""
    values = np.sqrt(np.clip(np.linalg.eigvalsh(features.T.astype(np.float64) @ features), 0, None))
    return _rank(values[-min(features.shape) :])  # there are no more singular values than images


def rankme_interval(features: np.ndarray, *, blocks: int) -> tuple[float, float]:
    """95 % interval of RankMe by a jackknife that leaves out one of `blocks` blocks of images at a time."""
    features = features.astype(np.float64)
    parts = np.array_split(features, min(blocks, len(features)))
    if len(parts) < 2:
        return (float("nan"), float("nan"))
    total = features.T @ features
    without = np.array([_rank(np.sqrt(np.clip(np.linalg.eigvalsh(total - part.T @ part), 0, None))) for part in parts])
    error = np.sqrt((len(parts) - 1) / len(parts) * np.sum((without - without.mean()) ** 2))
    value = rankme(features)
    return (float(value - 1.959963984540054 * error), float(value + 1.959963984540054 * error))


def _rank(values: np.ndarray) -> float:
    shares = values / values.sum() + 1e-7  # as in the paper
    return float(np.exp(-np.sum(shares * np.log(shares))))
