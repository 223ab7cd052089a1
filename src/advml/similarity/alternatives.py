"""Measures of similarity other than linear CKA, in one table: kernel CKA, shapes, distances, subspaces, neighbours, regression.

    layers = [compact(features, images) for features in ...]      # pooled features (N, C) of the same images
    found = tables(MEASURES["rsa"], {first: layers, second: others}, [(first, second)])    # keys as in `cka`
    found.matrix(first, second)      # (L1, L2)

All are 1 for equal representations and lower for less similar ones, and are invariant to rotation, scaling by one number and shift.
Features are pooled (see `probes.pooling`), because regression, canonical correlations and shapes are (nearly) 1 for features wider than
the number of images; at most MOST_IMAGES images are used. `cka-pooled` is the paper's measure on the same pooled features, and shows the
effect of pooling.

They are implemented here because netrep (Williams et al. 2021) is on no package index, and rsatoolbox depends on an imaging library.
Values agree with both, see docs/similarity.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata

from advml.core.device import generator_for
from advml.similarity.cka import Key, u_centred

MOST_IMAGES = 512  # largest number of images whose features are kept, at most 2 MiB per layer
BLOCKS = 10  # number of blocks of images for the jackknife
BANDWIDTH = 0.4  # of the Gaussian kernel, in median distances (Kornblith et al. 2019, table 2)
VARIANCE = 0.99  # share of variance kept by SVCCA (Raghu et al. 2017)
NEIGHBOURS = 10  # number of nearest neighbours, as in ReSi (Klabunde et al. 2025)

Layers = Sequence[np.ndarray]  # features (n, p) of the same n images; p may differ


@dataclass(frozen=True)
class Measure:
    """A measure of similarity between representations.

    Attributes:
        prepare: function from centred features (n, p) to the array that is kept of a layer.
        compare: function from L1 and L2 prepared layers to values (L1, L2).
        source: publication.
        domain: the measure is a function of this: Gram matrix, features or neighbours.
        cost: of one pair of layers, without `prepare`.
        also_invariant: invariances beyond rotation, one factor and an offset.
        smooth: whether jackknife intervals over images are valid; they are not if the value jumps or depends on the number of images.
        needs: condition on the number of images n, for features of width p.
    """

    prepare: Callable[[np.ndarray], np.ndarray]
    compare: Callable[[Layers, Layers], np.ndarray]
    source: str
    domain: str
    cost: str
    also_invariant: str = ""
    smooth: bool = True
    needs: str = "n >= 4"


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values)


def _inner(first: Layers, second: Layers) -> np.ndarray:
    """Inner products of vectors of unit length."""
    return np.stack(first) @ np.stack(second).T


def _pairwise(value: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Layers, Layers], np.ndarray]:
    return lambda first, second: np.array([[value(one, other) for other in second] for one in first])


def _angular(first: Layers, second: Layers) -> np.ndarray:
    """Shape similarity 1 - 2/pi arccos |X^T Y|_*, where the arccos is a metric."""
    return 1 - 2 / np.pi * np.arccos(np.clip(_pairwise(_nuclear)(first, second), -1, 1))


def _linear(features: np.ndarray) -> np.ndarray:
    """Linear Gram matrix U(X X^T), scaled to unit length."""
    return _unit(u_centred(torch.from_numpy(features @ features.T)).numpy())


def _gaussian(features: np.ndarray) -> np.ndarray:
    """Gaussian Gram matrix U(K), scaled to unit length: K_ij = exp(-|x_i - x_j|^2 / (2 s^2)), s = BANDWIDTH times the median distance."""
    distances = pdist(features)
    width = BANDWIDTH * (np.median(distances) or distances.max())
    return _unit(u_centred(torch.from_numpy(squareform(np.exp(-np.square(distances / width) / 2)))).numpy())


def _ranks(features: np.ndarray) -> np.ndarray:
    """Ranks of the distances between images, centred and scaled to unit length, so that inner products are Spearman's correlations."""
    ranks = rankdata(pdist(features))
    return _unit(ranks - ranks.mean())


def _singular_values(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Singular values of X^T Y, from the eigenvalues of the smaller of its products with its transpose; accurate to 1e-7."""
    product = first.T @ second
    product = product.T @ product if product.shape[0] > product.shape[1] else product @ product.T
    return np.sqrt(np.clip(np.linalg.eigvalsh(product), 0, None))


def _nuclear(first: np.ndarray, second: np.ndarray) -> float:
    """Nuclear norm |X^T Y|_*, the maximum of <X Q, Y> over orthogonal Q."""
    return float(_singular_values(first, second).sum())


def _directions(features: np.ndarray) -> np.ndarray:
    """Orthonormal directions (n, k) of the smallest number of principal components that keep VARIANCE."""
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    kept = np.cumsum(values**2) / (values**2).sum()
    return left[:, : int(np.searchsorted(kept, VARIANCE * (1 - 1e-12))) + 1]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Mean canonical correlation; NaN if there are too few images, so that some directions necessarily coincide."""
    possible = first.shape[1] + second.shape[1] < len(first)
    return float(_singular_values(first, second).mean()) if possible else np.nan


def _neighbours(features: np.ndarray) -> np.ndarray:
    """Mask (n, n) of each image's nearest neighbours."""
    distances = squareform(pdist(features))
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(features) - 1)]
    found = np.zeros(distances.shape, bool)
    np.put_along_axis(found, nearest, True, axis=1)
    return found


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard index of neighbourhoods, |A and B| / |A or B|, averaged over images."""
    return float(((first & second).sum(1) / (first | second).sum(1)).mean())


def _explained(first: Layers, second: Layers) -> np.ndarray:
    """Adjusted R^2 of predicting the second layers from the first: 1 - (1 - R^2) (n - 1) / (n - 1 - k), 0 on average for noise."""
    found = np.full((len(first), len(second)), np.nan)
    for row, predictors in enumerate(first):
        left, values, _ = np.linalg.svd(predictors, full_matrices=False)
        basis = left[:, values > 1e-6 * values[0]]
        n, k = basis.shape
        if k < n - 1:
            found[row] = [1 - (1 - np.square(basis.T @ target).sum()) * (n - 1) / (n - 1 - k) for target in second]
    return found


KORNBLITH, WILLIAMS, RAGHU = "Kornblith et al. 2019", "Williams et al. 2021", "Raghu et al. 2017"
# All values of `similarity.measures` except `cka`, which is computed in a pass of its own, without pooling (see `cka`).
MEASURES: dict[str, Measure] = {
    "cka-pooled": Measure(_linear, _inner, "Nguyen et al. 2021", "Gram matrix", "n^2"),
    "cka-rbf": Measure(_gaussian, _inner, KORNBLITH, "Gram matrix", "n^2"),
    "procrustes": Measure(_unit, _pairwise(_nuclear), WILLIAMS, "features", "n p^2 + p^3"),
    "shape": Measure(_unit, _angular, WILLIAMS, "features", "n p^2 + p^3"),
    "rsa": Measure(_ranks, _inner, "Kriegeskorte et al. 2008", "Gram matrix", "n^2", also_invariant="monotone changes of distances"),
    "svcca": Measure(
        _directions,
        _pairwise(_correlation),
        RAGHU,
        "features",
        "n k^2 + k^3",
        also_invariant="invertible maps of the directions kept",
        smooth=False,
        needs="n > k + k'",
    ),
    "knn": Measure(_neighbours, _pairwise(_jaccard), "Klabunde et al. 2025", "neighbours", "n^2", "what keeps neighbours", smooth=False),
    "r2": Measure(_unit, _explained, KORNBLITH, "features", "n p^2", "invertible maps of the rows' layer", needs="n > p + 1"),
}


# Choice of images, and compact features


def chosen(count: int) -> np.ndarray:
    """Indices of the images to use: all, or MOST_IMAGES of them, always the same ones for a given count."""
    order = torch.randperm(count, generator=generator_for("similarity", count)).numpy()
    return np.sort(order[:MOST_IMAGES])


def compact(features: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Features (N, p) of the images at `places`, float64, rotated into as many columns as there are images if p is larger.

    The measures are invariant to this rotation, X -> R^T with X^T = Q R. Zeros if the layer is dead, i.e. constant over images.
    """
    found = features[places].astype(np.float64)
    if np.ptp(found, axis=0).max() <= 1e-6 * np.abs(found).max():
        return np.zeros((len(places), 1))
    found -= found.mean(0)
    return found if found.shape[1] <= len(found) or not np.isfinite(found).all() else np.linalg.qr(found.T, mode="r").T


# Tables of values


def blocks(count: int) -> list[np.ndarray]:
    """Indices of `count` images, divided into BLOCKS parts for the jackknife."""
    return np.array_split(np.arange(count), BLOCKS) if count >= 4 * BLOCKS else []


@dataclass(frozen=True, eq=False)
class Tables:
    """Values of one measure, from which scalars are computed.

    Attributes:
        tables: for pairs of keys, (1 + B, L1, L2): the values, and those without each block of images. NaN for dead layers.
        sizes: number of images in each block; empty if the measure has no intervals.
    """

    tables: Mapping[tuple[Key, Key], np.ndarray]
    sizes: tuple[int, ...]

    def matrix(self, first: Key, second: Key) -> np.ndarray:
        """(L1, L2)."""
        return self.tables[first, second][0]

    def without_each(self, first: Key, second: Key) -> Iterator[np.ndarray]:
        """Yield the values without each block (B, L1, L2), in parts."""
        yield self.tables[first, second][1:]

    def alive(self, first: Key, second: Key) -> tuple[np.ndarray, np.ndarray]:
        """Masks (L1,) and (L2,) of living layers, which are not constant over images."""
        found = np.isfinite(self.matrix(first, second))
        return found.any(1), found.any(0)


def tables(measure: Measure, layers: Mapping[Key, Layers], pairs: Sequence[tuple[Key, Key]], *, intervals: bool = True) -> Tables:
    """Values of one measure for pairs of keys; prepared layers are kept only as long as they are needed."""
    count = len(next(iter(layers.values()))[0])
    left_out = blocks(count) if measure.smooth and intervals else []
    found: dict[tuple[Key, Key], list[np.ndarray]] = {pair: [] for pair in pairs}
    for block in (np.empty(0, int), *left_out):
        rows = np.setdiff1d(np.arange(count), block)
        prepared = lru_cache(maxsize=4)(lambda key, rows=rows: _prepared(measure, layers[key], rows))
        for first, second in pairs:
            one, other = prepared(first), prepared(second)
            values = np.full((len(layers[first]), len(layers[second])), np.nan)
            if one and other:
                values[np.ix_(list(one), list(other))] = measure.compare(list(one.values()), list(other.values()))
            found[first, second].append(values)
    return Tables({pair: np.stack(values) for pair, values in found.items()}, tuple(len(block) for block in left_out))


def without_value(layers: Mapping[Key, Layers], found: Tables) -> tuple[int, int]:
    """Number of pairs of living layers for which a measure has no value, and number of all such pairs."""
    alive = {key: sum(map(_is_alive, each)) for key, each in layers.items()}
    total = sum(alive[first] * alive[second] for first, second in found.tables)
    return total - sum(int(np.isfinite(found.matrix(*pair)).sum()) for pair in found.tables), total


def _is_alive(centred: np.ndarray) -> bool:
    return bool(np.isfinite(centred).all() and np.ptp(centred, axis=0).max() > 0)


def _prepared(measure: Measure, layers: Layers, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Prepared living layers, by index."""
    parts = {number: layer[rows] - layer[rows].mean(0) for number, layer in enumerate(layers)}
    return {number: measure.prepare(part) for number, part in parts.items() if _is_alive(part)}


def describe(names: Sequence[str], count: int) -> dict[str, Any]:
    """Record of how these measures were computed from `count` images; empty if there are none."""
    used = len(chosen(count))
    enough = f"95 %, jackknife over {BLOCKS} blocks of images, t quantiles" if blocks(used) else f"none: {used} images are too few"
    jumps = "none: it is not a smooth function of the images"
    intervals = {name: enough if MEASURES[name].smooth else jumps for name in names}
    return {"measures": {"features": "pooled over space or tokens", "images": used, "of": count, "intervals": intervals}} if names else {}
