"""Every measure against a second implementation on layers of real networks, and against what theory says it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from scipy.linalg import subspace_angles
from scipy.spatial import procrustes
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from sklearn.neighbors import NearestNeighbors

from advml.config.values import MeasureName
from advml.similarity import alternatives
from advml.similarity.alternatives import BLOCKS, MEASURES, chosen, compact, tables
from advml.similarity.layers import layers
from advml.similarity.probes import pooled_features
from advml.similarity.represent import further_tables

FIRST, SECOND = ("first", "clean"), ("second", "clean")
NAMES = list(MEASURES)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def value(name: str, first: np.ndarray, second: np.ndarray) -> float:
    places = np.arange(len(first))
    given = {FIRST: [compact(first, places)], SECOND: [compact(second, places)]}
    return tables(MEASURES[name], given, [(FIRST, SECOND)]).matrix(FIRST, SECOND)[0, 0]


# Second implementations


def debiased(first: np.ndarray, second: np.ndarray) -> float:
    """CKA of Gram matrices by Song et al. 2012, eq. 5: traces and sums, nothing centred."""

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        n, k, other = len(k), k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
        return np.trace(k @ other) + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ other).sum()

    return hsic(first, second) / np.sqrt(hsic(first, first) * hsic(second, second))


def gaussian_kernel(x: np.ndarray) -> np.ndarray:
    median = np.median(euclidean_distances(x)[np.triu_indices(len(x), 1)])
    return rbf_kernel(x, gamma=1 / (2 * (0.4 * median) ** 2))


def disparity(x: np.ndarray, y: np.ndarray) -> float:
    """scipy's, of shapes padded to one width: 1 - |X^T Y|_*^2."""
    width = max(x.shape[1], y.shape[1])
    return procrustes(*(np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in (x, y)))[2]


def mean_cosine(x: np.ndarray, y: np.ndarray) -> float:
    first, second = (PCA(0.99, svd_solver="full").fit_transform(each) for each in (x, y))
    if first.shape[1] + second.shape[1] > len(x) - 1:
        return np.nan
    return np.cos(subspace_angles(first, second)).mean()


def jaccard(x: np.ndarray, y: np.ndarray) -> float:
    first, second = (NearestNeighbors(n_neighbors=10).fit(each).kneighbors(return_distance=False) for each in (x, y))
    return np.mean([len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(first.tolist(), second.tolist(), strict=True)])


def adjusted(x: np.ndarray, y: np.ndarray) -> float:
    n, k = len(x), np.linalg.matrix_rank(x - x.mean(0), tol=1e-6 * np.linalg.norm(x - x.mean(0), 2))
    if k >= n - 1:
        return np.nan
    predicted = LinearRegression().fit(x, y).predict(x)
    return 1 - np.square(y - predicted).sum() / np.square(y - y.mean(0)).sum() * (n - 1) / (n - 1 - k)


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cka-pooled": lambda x, y: debiased(x @ x.T, y @ y.T),
    "cka-rbf": lambda x, y: debiased(gaussian_kernel(x), gaussian_kernel(y)),
    "procrustes": lambda x, y: np.sqrt(1 - disparity(x, y)),
    "shape": lambda x, y: 1 - 2 / np.pi * np.arccos(np.sqrt(1 - disparity(x, y))),
    "rsa": lambda x, y: spearmanr(pdist(x), pdist(y)).statistic,
    "svcca": mean_cosine,
    "knn": jaccard,
    "r2": adjusted,
}


@pytest.fixture(scope="module")
def real() -> list[np.ndarray]:
    """Pooled features of 60 images: blocks of a convolutional network and of a transformer, three of them wider than there are images."""
    torch.manual_seed(0)
    images, found = torch.rand(60, 3, 32, 32), []
    for name, options in (("test_resnet", {}), ("test_vit", {"img_size": 32})):
        network = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
        rows = layers(network, images[:2], select=["blocks"])
        found += [features.astype(np.float64) for features in pooled_features(network, rows[:4], [images])]
    assert sorted({features.shape[1] > 60 for features in found}) == [False, True]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_measures_equal_a_second_implementation_on_real_layers(name, real):
    given = {FIRST: [compact(features, np.arange(60)) for features in real]}
    found = tables(MEASURES[name], given, [(FIRST, FIRST)]).matrix(FIRST, FIRST)
    expected = np.array([[ORACLES[name](x, y) for y in real] for x in real])
    off_diagonal = ~np.eye(len(real), dtype=bool)  # where an oracle may take the root of a rounding error
    np.testing.assert_allclose(found[off_diagonal], expected[off_diagonal], atol=2e-6)
    assert np.nanmin(found) < 0.9


def test_there_is_an_oracle_and_a_name_in_params_yaml_for_every_measure():
    assert [*ORACLES] == NAMES
    assert get_args(MeasureName) == ("cka", *NAMES)


# Closed forms


@pytest.mark.parametrize("name", NAMES)
def test_a_rotated_scaled_and_shifted_copy_is_the_same_representation(name):
    x = noise(50, 12) @ np.diag(np.linspace(0.5, 3, 12))
    turn = np.linalg.qr(noise(20, 12, seed=1))[0].T  # into more columns
    assert value(name, x, 7 + 3 * x @ turn) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cka-pooled", 0), ("cka-rbf", 0), ("rsa", 0), ("r2", 0), ("knn", 10 / 299 / (2 - 10 / 299)), ("svcca", None), ("procrustes", None)],
)
def test_independent_features_give_what_chance_gives(name, expected):
    """The singular values of X^T Y are near those of a Gaussian p x p matrix over n, whose mean is 8 / (3 pi) sqrt(p / n)."""
    found = np.mean([value(name, noise(300, 20, seed=2 * draw), noise(300, 20, seed=2 * draw + 1)) for draw in range(10)])
    chance = 8 / (3 * np.pi) * np.sqrt(20 / 300)
    assert found == pytest.approx(chance if expected is None else expected, abs=0.015)


@pytest.mark.parametrize("name", ["svcca", "r2"])
def test_linear_maps_change_only_measures_that_are_not_invariant_to_them(name):
    x = noise(80, 8)
    y = x @ np.diag([1.0, 1.2, 0.7, 2.0, 1.5, 0.5, 0.9, 3.0])
    assert value(name, x, y) == pytest.approx(1, abs=1e-6)
    assert all(value(other, x, y) < 0.99 for other in set(NAMES) - {"svcca", "r2"})


def test_regression_goes_from_rows_to_columns():
    x = noise(80, 8)
    assert value("r2", x, x[:, :4]) == pytest.approx(1)
    assert value("r2", x[:, :4], x) == pytest.approx(
        1 - np.square(x[:, 4:] - x[:, 4:].mean(0)).sum() / np.square(x - x.mean(0)).sum(), abs=0.1
    )


@pytest.mark.parametrize("name", ["r2", "svcca"])
def test_more_columns_than_images_allow_are_not_taken_for_likeness_and_that_is_said(name, capsys):
    assert np.isnan(value(name, noise(20, 30), noise(20, 3)))
    given = {FIRST: [noise(20, 30), noise(20, 3), np.zeros((20, 2))]}
    found = further_tables(given, [(FIRST, FIRST)], [name, "rsa"])
    assert np.isfinite(found["rsa"].matrix(FIRST, FIRST)).sum() == 4
    missing = int(4 - np.isfinite(found[name].matrix(FIRST, FIRST)).sum())
    assert missing == {"r2": 2, "svcca": 3}[name]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} has no value for {missing} of 4 pairs" in line and MEASURES[name].needs in line


# Which images, dead layers, intervals


@pytest.mark.parametrize("name", NAMES)
def test_features_wider_than_images_are_turned_without_a_change(name):
    x, y = noise(30, 90), noise(30, 90, seed=1)
    narrow = compact(x, np.arange(30))
    assert narrow.shape == (30, 30)
    np.testing.assert_allclose(narrow @ narrow.T, (x - x.mean(0)) @ (x - x.mean(0)).T, atol=1e-9)
    given = {FIRST: [x - x.mean(0)], SECOND: [y - y.mean(0)]}
    whole = tables(MEASURES[name], given, [(FIRST, SECOND)]).matrix(FIRST, SECOND)
    np.testing.assert_allclose(value(name, x, y), whole[0, 0], atol=1e-6)


def test_of_many_images_a_subset_is_compared_always_the_same(monkeypatch):
    assert chosen(40).tolist() == list(range(40))
    found = chosen(5000)
    assert len(set(found.tolist())) == alternatives.MOST_IMAGES and found.max() > 4000 and found.tolist() == chosen(5000).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dead", [np.zeros((40, 3)), np.full((40, 3), 1e4) + 1e-4 * noise(40, 3), np.full((40, 3), np.nan)])
def test_dead_layers_are_nan_and_spoil_no_others(name, dead):
    places = np.arange(40)
    given = {FIRST: [compact(each, places) for each in (noise(40, 5), dead, noise(40, 4, seed=1))]}
    found = tables(MEASURES[name], given, [(FIRST, FIRST)])
    assert np.isfinite(found.matrix(FIRST, FIRST)).tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    assert [each.tolist() for each in found.alive(FIRST, FIRST)] == [[True, False, True]] * 2


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_images_are_left_out_where_that_gives_an_interval(name):
    x, y = noise(53, 4), noise(53, 4) + noise(53, 4, seed=1)
    found = tables(MEASURES[name], {FIRST: [x], SECOND: [y]}, [(FIRST, SECOND)])
    (without,) = found.without_each(FIRST, SECOND)
    if not MEASURES[name].smooth:
        assert found.sizes == () and len(without) == 0
        return
    assert sum(found.sizes) == 53 and len(found.sizes) == BLOCKS == len(without)
    assert without[1, 0, 0] == pytest.approx(value(name, np.delete(x, range(6, 12), 0), np.delete(y, range(6, 12), 0)))


@pytest.mark.parametrize("name", [name for name in NAMES if MEASURES[name].smooth])
def test_the_jackknife_holds_the_spread_of_the_measure(name):
    """Its standard error, over repeated draws of images, against the measure's own deviation."""
    values, errors = [], []
    for draw in range(30):
        x = noise(60, 4, seed=3 * draw)
        y = x + noise(60, 4, seed=3 * draw + 1)
        found = tables(MEASURES[name], {FIRST: [x], SECOND: [y]}, [(FIRST, SECOND)])
        (without,) = found.without_each(FIRST, SECOND)
        values.append(found.matrix(FIRST, SECOND)[0, 0])
        errors.append((BLOCKS - 1) / BLOCKS * np.square(without[:, 0, 0] - without[:, 0, 0].mean()).sum())
    assert 0.6 < np.sqrt(np.mean(errors)) / np.std(values) < 1.6
