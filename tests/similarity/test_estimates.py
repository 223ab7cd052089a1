"""Intervals hold the truth about as often as they say: simulations, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from advml.similarity import summary
from advml.similarity.cka import Similarity, centred_gram
from advml.similarity.estimates import Estimate, Spread, difference, jackknife, over_seeds

LAYERS, SIZE, POOL = 6, 30, 400
KEY = ("net", "clean")


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    """Products of POOL batches of 30 images: six layers of a network, ever further from the first, on ten classes of heavy tails."""
    random = np.random.default_rng(0)
    decay = np.exp(-0.25 * np.arange(12))[:, None]
    first, others = random.normal(size=(12, 16)) * decay, random.normal(size=(LAYERS, 12, 16)) * decay
    weights = [(1 - share) * first + share * other for share, other in zip(np.linspace(0, 1, LAYERS), others, strict=True)]
    classes, products = 1.2 * random.normal(size=(10, 12)), []
    for _ in range(POOL):
        seen = classes[random.integers(10, size=SIZE)] + random.normal(size=(SIZE, 12)) * random.gamma(2, 0.5, size=(SIZE, 1))
        grams = np.stack([centred_gram(torch.from_numpy(np.tanh(seen @ weight))).numpy() for weight in weights])
        products.append(2 * grams @ grams.T)
    return np.stack(products)


def similarity(products: np.ndarray) -> Similarity:
    return Similarity({}, {(KEY, KEY): products}, {KEY: np.diagonal(products, axis1=1, axis2=2)}, (SIZE,) * len(products))


@pytest.mark.parametrize(("batches", "least"), [(5, 0.92), (8, 0.92), (10, 0.92), (12, 0.92), (30, 0.92)])
@pytest.mark.parametrize("name", ["redundancy", "effective_layers"])
def test_intervals_over_batches_hold_the_truth(pool, name, batches, least):
    """A percentile bootstrap holds it in 86, 88, 91, 91 and 95 % of the cases. The pool is the population."""
    random, scalar = np.random.default_rng(batches), summary.SCALARS[name]
    truth, hits, trials = summary.estimate(similarity(pool), scalar, "net", "net").value, 0, 500
    for _ in range(trials):
        low, high = summary.estimate(similarity(pool[random.integers(POOL, size=batches)]), scalar, "net", "net").interval
        hits += low <= truth <= high
    assert least <= hits / trials <= 0.985


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("between", "shared", "own"), [(1, 0, 0), (1, 0.3, 0), (1, 1, 1), (0.3, 1, 0.3), (0, 1, 0)])
def test_intervals_over_seeds_hold_the_truth(seeds, between, shared, own):
    """Seeds differ by `between`; all see the same 12 batches, whose errors are partly common and partly a seed's own. The truth is 0."""
    random, batches, hits, trials = np.random.default_rng(seeds), 12, 0, 1500
    for _ in range(trials):
        common = random.normal(0, shared, batches)
        estimates = []
        for _ in range(seeds):
            values = random.normal(0, between / math.sqrt(batches)) + common + random.normal(0, own, batches)
            estimates.append(Estimate(values.mean(), values - values.mean(), batches - 1))
        low, high = over_seeds(estimates).interval
        hits += low <= 0 <= high
    assert hits / trials >= 0.93


def test_two_seeds_make_a_t_interval_of_one_degree_of_freedom():
    certain = [Estimate(value, np.zeros(6), 5) for value in (0.2, 0.3)]
    low, high = over_seeds(certain).interval
    assert (low + high) / 2 == pytest.approx(0.25) and (high - low) / 2 == pytest.approx(12.7062 * 0.05, rel=1e-4)
    three = over_seeds([*certain, Estimate(0.25, np.zeros(6), 5)]).interval
    assert (three[1] - three[0]) / 2 == pytest.approx(4.3027 * 0.05 / math.sqrt(3), rel=1e-4)


def test_one_seed_keeps_its_own_interval():
    only = Estimate(0.2, np.array([0.1, -0.1, 0.2, -0.2, 0]), 4)
    assert over_seeds([only]) is only


def test_errors_over_batches_that_all_seeds_share_do_not_average_out():
    one = Estimate(0.2, np.array([0.1, -0.1, 0.2, -0.2, 0]), 4)
    assert over_seeds([one] * 9).interval == pytest.approx(one.interval)
    image = Estimate(0.2, np.empty(0), spreads=(Spread(0.01),))
    assert over_seeds([image] * 9).interval == pytest.approx((0.2 - 0.196, 0.2 + 0.196), abs=1e-4)


def test_a_difference_takes_off_what_both_have_in_common():
    common, own = np.array([0.3, -0.3, 0.1, -0.1, 0, 0]), np.array([0.01, -0.01, 0.01, -0.01, 0, 0])
    first, second = Estimate(0.8, common + own, 5), Estimate(0.5, common, 4.5)
    found = difference(first, second)
    assert found.value == pytest.approx(0.3) and found.degrees == 4.5
    half = scipy.stats.t.ppf(0.975, 4.5) * math.sqrt(np.square(own).sum() / 30)
    assert found.interval == pytest.approx((0.3 - half, 0.3 + half))


def test_independent_sources_add_up():
    parts = [Estimate(value, np.empty(0), spreads=(Spread(variance),)) for value, variance in ((0.7, 0.0009), (0.4, 0.0016))]
    low, high = difference(*parts).interval
    assert (low, high) == pytest.approx((0.3 - 1.959964 * 0.05, 0.3 + 1.959964 * 0.05))


def test_different_numbers_of_batches_are_not_paired():
    with pytest.raises(ValueError, match="6 batches cannot be paired with 5"):
        difference(Estimate(1, np.zeros(6)), Estimate(1, np.zeros(5)))
    with pytest.raises(ValueError, match="different numbers of batches"):
        over_seeds([Estimate(1, np.zeros(6)), Estimate(1, np.zeros(5))])


def test_a_small_last_batch_does_not_pass_for_a_whole_one():
    without = np.array([0.5, 0.6, 0.4, 0.55, 0.45, 0.5])
    assert jackknife(0.5, without, [30] * 6).degrees == pytest.approx(5)
    assert jackknife(0.5, without, [30] * 5 + [4]).degrees == pytest.approx(4, abs=0.02)


def test_a_value_without_anything_behind_it_has_no_interval():
    assert np.isnan(Estimate(0.5, np.empty(0)).interval).all()
    assert np.isnan(Estimate(0.5, np.array([0.1, np.nan, 0, 0, 0]), 4).interval).all()
