"""Scalars of similarity matrices, and RankMe, with jackknife intervals over batches (see `statistics`).

Models measured on the same batches share errors per batch, so differences between them are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from advml.similarity.alternatives import Tables
from advml.similarity.cka import Key, Similarity
from advml.similarity.statistics import FEWEST_BATCHES, Estimate, jackknife

Matrices = np.ndarray  # (..., L, L)


def mean_off_diagonal(cka: Matrices) -> np.ndarray:
    """Redundancy: mean CKA of different layers. (..., L, L) -> (...)."""
    return _mean(cka, ~np.eye(cka.shape[-1], dtype=bool))


def long_range(cka: Matrices) -> np.ndarray:
    """Mean CKA of layers more than half of the depth apart: |i - j| > L / 2, e.g. |i - j| > 8 for 16 blocks."""
    places = np.arange(cka.shape[-1])
    return _mean(cka, np.abs(places[:, None] - places) > cka.shape[-1] / 2)


def effective_layers(cka: Matrices) -> np.ndarray:
    """Effective number of layers: exp of the Shannon entropy of the normalised eigenvalues; L for unrelated layers, 1 for copies.

    The estimate of CKA is unbiased, so eigenvalues near zero may be negative; these count as zero.
    """
    if not np.isfinite(cka).all():
        return np.full(cka.shape[:-2], np.nan)
    values = np.clip(np.linalg.eigvalsh((cka + np.swapaxes(cka, -1, -2)) / 2), 0, None)
    shares = values / values.sum(-1, keepdims=True)
    return np.exp(-np.sum(np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0), axis=-1))


def diagonal_mean(cka: Matrices) -> np.ndarray:
    """Mean of the diagonal; between clean and adversarial images, the similarity that layers keep under attack."""
    return np.diagonal(cka, axis1=-2, axis2=-1).mean(-1)


def diagonal_last_quarter(cka: Matrices) -> np.ndarray:
    """Mean of the diagonal over the last quarter of the layers (rounded up)."""
    return _last_quarter(np.diagonal(cka, axis1=-2, axis2=-1)).mean(-1)


def diagonal_first_quarter(cka: Matrices) -> np.ndarray:
    """Mean of the diagonal over the first quarter of the layers (rounded up)."""
    return _last_quarter(np.diagonal(cka, axis1=-2, axis2=-1)[..., ::-1]).mean(-1)


def _last_quarter(diagonal: np.ndarray) -> np.ndarray:
    count = math.ceil(diagonal.shape[-1] / 4)
    return diagonal[..., -count:]


def _mean(cka: Matrices, chosen: np.ndarray) -> np.ndarray:
    return cka[..., chosen].mean(-1) if chosen.any() else np.full(cka.shape[:-2], np.nan)


@dataclass(frozen=True)
class Scalar:
    """A scalar of the matrix between layers on the kinds of input `first` (rows) and `second` (columns)."""

    of: Callable[[Matrices], np.ndarray]
    first: str = "clean"
    second: str = "clean"

    def keys(self, first: str, second: str) -> tuple[Key, Key]:
        """Keys (model, kind of input) of rows and columns, for two models by name."""
        return (first, self.first), (second, self.second)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Counted pairs of layers: indices (k,) among rows and columns, and mask (k,) of pairs that are alive."""

    rows: np.ndarray
    columns: np.ndarray
    alive: np.ndarray


ADVERSARIAL = {"first": "adversarial", "second": "adversarial"}
# Name of the metric, without the prefix `cka/` -> scalar.
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


def living(
    similarity: Similarity | Tables, keys: tuple[Key, Key], rows: np.ndarray | None = None, columns: np.ndarray | None = None
) -> Pairs:
    """Counted layers, in pairs: their indices among rows and columns, and the pairs that are alive on both sides.

    Args:
        rows, columns: (L1,), (L2,) bool, with equal numbers of True; None: all.
    """
    alive = similarity.alive(*keys)
    places = [np.flatnonzero(np.ones(len(each), bool) if mask is None else mask) for each, mask in zip(alive, (rows, columns), strict=True)]
    return Pairs(*places, alive[0][places[0]] & alive[1][places[1]])


def estimate(
    similarity: Similarity | Tables,
    scalar: Scalar,
    first: str,
    second: str,
    *,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
) -> Estimate:
    """Estimate a scalar between two models' layers, or within one model, from CKA or another measure.

    Args:
        first, second: names of models.
        rows, columns: (L1,), (L2,) bool: the counted layers of each, in pairs; None: all. Pairs with a dead layer are never counted.
        chosen: bool, the pairs to use; None: all that are alive.
    """
    keys = scalar.keys(first, second)
    pairs = living(similarity, keys, rows, columns)
    alive = pairs.alive if chosen is None else pairs.alive & chosen
    batches = len(similarity.sizes)
    if not alive.any():
        return Estimate(float("nan"), np.full(batches, np.nan))
    place = np.ix_(pairs.rows[alive], pairs.columns[alive])
    value = float(scalar.of(similarity.matrix(*keys)[place]))
    if not batches:  # a measure without intervals
        return Estimate(value, np.empty(0))
    without = [scalar.of(part[:, place[0], place[1]]) for part in similarity.without_each(*keys)]
    return jackknife(value, np.concatenate(without), similarity.sizes)


def rankme(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): exp of the entropy of the normalised singular values of features (N, D).

    NaN if all are zero.
    """
    values = np.sqrt(np.clip(np.linalg.eigvalsh(features.T.astype(np.float64) @ features), 0, None))
    return _rank(values[-min(features.shape) :])  # at most as many singular values as images


def rankme_interval(features: np.ndarray, *, blocks: int) -> tuple[float, float]:
    """95 % interval of RankMe by a jackknife over blocks of images; NaN with fewer than FEWEST_BATCHES."""
    features = features.astype(np.float64)
    parts = np.array_split(features, min(blocks, len(features)))
    if len(parts) < FEWEST_BATCHES:
        return (float("nan"), float("nan"))
    total = features.T @ features
    without = np.array([_rank(np.sqrt(np.clip(np.linalg.eigvalsh(total - part.T @ part), 0, None))) for part in parts])
    value, count = rankme(features), len(parts)
    return Estimate(value, (count - 1) * (without.mean() - without), count - 1).interval


def _rank(values: np.ndarray) -> float:
    if not values.sum() > 0:  # a dead encoder
        return float("nan")
    shares = values / values.sum() + 1e-7  # as in the paper
    return float(np.exp(-np.sum(shares * np.log(shares))))
