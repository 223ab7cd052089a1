"""Scores of measures on known orders: right for a measure that knows, -1 for one that errs, 0 for one that guesses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import somersd

from advml.similarity.alternatives import Tables
from advml.similarity.cka import Similarity
from advml.similarity.compare import Comparison, Panel
from advml.similarity.layers import Layer
from advml.similarity.trust import ORDERS, Variant, scores, somers_d, table

NETWORKS = [Variant("a", seed, noise, 8) for seed in (0, 1) for noise in (0.0, 0.5, 1.0)]
NETWORKS += [Variant("a", seed, 0.0, epochs) for seed in (0, 1) for epochs in (2, 4)]
NETWORKS += [Variant("b", seed, 0.0, 8) for seed in (0, 1)]


def slow_d(levels: list[float], values: list[float]) -> float:
    """Somers 1962, by counting."""
    pairs = [(a, b) for a, b in itertools.combinations(zip(levels, values, strict=True), 2) if a[0] != b[0]]
    return float(np.mean([np.sign((a[0] - b[0]) * (a[1] - b[1])) for a, b in pairs]))


def distance(one: Variant, other: Variant) -> float:
    """As it is known to be."""
    return (
        abs(one.noise - other.noise)
        + abs(one.epochs - other.epochs) / 8
        + (one.seed != other.seed) / 2
        + (one.architecture != other.architecture)
    )


def compared(right: float) -> Comparison:
    """Values of `cka` that say what is known, times `right`."""
    keys = [(each.name, "clean") for each in NETWORKS]
    ends = right * -np.array([[distance(one, other) for other in NETWORKS] for one in NETWORKS])
    panels = tuple(Panel("depth", each.name, each.name) for each in NETWORKS if each.noise == 0 and each.epochs == 8)
    places = np.array([0, 9, 1, 2, 9, 3, 4])  # two rows, at 9, are no blocks
    depth = -right * np.abs(places[:, None] - places).astype(float)
    rows = {key: tuple(Layer(str(place), "", (1,), is_block=place < 9) for place in places) for key in keys}
    tables = Tables({((panel.first, "clean"), (panel.first, "clean")): depth[None] for panel in panels}, ())
    similarity = Similarity(rows, {}, {key: np.ones((1, 1)) for key in keys}, (8,))
    return Comparison(panels, similarity, {}, {"rsa": tables}, {"rsa": ends})


@pytest.mark.parametrize(("right", "score"), [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)])
def test_a_measure_is_scored_by_whether_it_finds_what_is_known(right, score):
    found = scores(compared(right), NETWORKS)["rsa"]
    assert list(found) == list(ORDERS)
    assert {order: about["mean"] for order, about in found.items()} == {order: pytest.approx(score) for order in ORDERS}
    assert {order: len(about["each"]) for order, about in found.items()} == {
        "label noise": 2,
        "training length": 2,
        "depth": 4,
        "architecture": 1,
    }


def test_somers_d_counts_pairs_whose_levels_differ():
    random = np.random.default_rng(0)
    levels, values = random.integers(0, 3, 12).tolist(), random.normal(size=12).round(1).tolist()
    assert somers_d(levels, values) == pytest.approx(slow_d(levels, values)) == pytest.approx(somersd(levels, values).statistic)
    assert somers_d([0, 1, 2], [0.1, np.nan, 0.3]) == 1 and np.isnan(somers_d([1, 1], [0.1, 0.2]))


def test_the_table_begins_with_the_measure_that_finds_most():
    found = {"poor": scores(compared(-1), NETWORKS)["rsa"], "good": scores(compared(1), NETWORKS)["rsa"]}
    found["good"]["depth"]["mean"] = None
    assert table(found) == [["measure", *ORDERS], ["good", "1.00", "1.00", "-", "1.00"], ["poor", *["-1.00"] * 4]]
