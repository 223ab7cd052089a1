"""Intervals hold the truth about as often as they say: simulations, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from advml.evaluation.intervals import wilson
from advml.similarity import measures
from advml.similarity.cka import Similarity, centred_gram
from advml.similarity.statistics import Estimate, difference, jackknife, mcnemar, over_seeds, share

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
    random, scalar = np.random.default_rng(batches), measures.SCALARS[name]
    truth, hits, trials = measures.estimate(similarity(pool), scalar, "net", "net").value, 0, 500
    for _ in range(trials):
        low, high = measures.estimate(similarity(pool[random.integers(POOL, size=batches)]), scalar, "net", "net").interval
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


def test_a_difference_takes_off_what_both_have_in_common():
    common, own = np.array([0.3, -0.3, 0.1, -0.1, 0, 0]), np.array([0.01, -0.01, 0.01, -0.01, 0, 0])
    first, second = Estimate(0.8, common + own, 5), Estimate(0.5, common, 4.5)
    found = difference(first, second)
    assert found.value == pytest.approx(0.3) and found.degrees == 4.5
    half = scipy.stats.t.ppf(0.975, 4.5) * math.sqrt(np.square(own).sum() / 30)
    assert found.interval == pytest.approx((0.3 - half, 0.3 + half))


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


# Accuracies on the same images

IMAGES = 359
TABLES = [(200, 40, 25, 94), (36, 12, 2, 0), (0, 3, 0, 20), (30, 0, 0, 0), (0, 0, 0, 30), (0, 30, 0, 0), (1, 1, 7, 12), (300, 58, 0, 1)]


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two models, by how many images both, only one, or neither has right."""
    counts = (both, first, second, neither)
    return tuple(np.repeat(np.array(right, dtype=bool), counts) for right in ([1, 1, 0, 0], [1, 0, 1, 0]))


def paired(*counts: int) -> tuple[float, float]:
    return difference(*map(share, outcomes(*counts))).interval


def tango(first: np.ndarray, second: np.ndarray, n: int, m: float | np.ndarray) -> np.ndarray:
    """Tango's score of the difference m, in his closed form (1998, Stat. Med. 17:891, eq. 5 to 8)."""
    b = 2 * n * m - (first + second) - (first - second) * m
    only_second = (np.sqrt(b**2 + 8 * n * second * m * (1 - m)) - b) / (4 * n)
    variance = n * (2 * only_second + m * (1 - m))
    return (first - second - n * m) / np.sqrt(np.maximum(variance, 1e-300))


@pytest.mark.parametrize("counts", TABLES)
def test_at_the_ends_of_a_paired_interval_tangos_score_is_the_quantile(counts):
    low, high = paired(*counts)
    scores = [float(tango(counts[1], counts[2], sum(counts), end)) for end in (low, high)]
    expected = [1.959964 if low > -1 else 0, -1.959964 if high < 1 else 0]
    assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("counts", "published"),
    [
        ((10, 9, 3, 10), (-0.027, 0.390)),  # Tango 1998, section 6.2: sleeping difficulties
        ((59, 6, 16, 80), (-0.1240, -0.0054)),  # R's contingencytables, the software of Fagerland, Lydersen & Laake 2017, chapter 8
    ],
)
def test_published_intervals_come_out(counts, published):
    assert paired(*counts) == pytest.approx(published, abs=5e-4)


def coverage(p: float, q: float, correlation: float, n: int) -> float:
    """How often Tango's interval of p - q holds it, exactly: summed over all numbers of images that only one model has right."""
    both = p * q + correlation * math.sqrt(p * (1 - p) * q * (1 - q))
    one, other = p - both, q - both
    firsts, seconds = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    weights = scipy.stats.multinomial.pmf(np.stack([firsts, seconds, n - firsts - seconds], axis=-1), n, [one, other, 1 - one - other])
    return float(weights[np.abs(tango(firsts, seconds, n, p - q)) <= 1.959964].sum())


@pytest.mark.parametrize("correlation", [0, 0.5, 0.8])
@pytest.mark.parametrize(("p", "q"), [(0.98, 0.97), (0.97, 0.97), (0.75, 0.75), (0.75, 0.7), (0.5, 0.45)])
def test_intervals_of_paired_differences_hold_the_truth(p, q, correlation):
    """Near 1, and correlated, hardly any image tells two models apart: every interval is discrete."""
    assert 0.94 <= coverage(p, q, correlation, IMAGES) <= (0.96 if p < 0.9 else 0.97)


@pytest.mark.parametrize(("right", "n"), [(0, 30), (27, 30), (30, 30), (359, 500)])
def test_of_one_accuracy_the_interval_is_wilsons(right, n):
    assert share(np.arange(n) < right).interval == pytest.approx(wilson(right, n))


def test_the_more_alike_models_are_the_narrower_is_the_interval_of_their_difference():
    """At .75 each: no correlation, .5, .8 and 1. Taken as independent, all would have the first one's width."""
    apart = [round(IMAGES * 0.75 * 0.25 * (1 - correlation)) for correlation in (0, 0.5, 0.8, 1)]
    widths = [np.diff(paired(0, each, each, IMAGES - 2 * each)).item() for each in apart]
    independent = 2 * 1.959964 * math.sqrt(2 * 0.75 * 0.25 / IMAGES)
    assert [width / independent for width in widths] == pytest.approx([1, 0.71, 0.46, 0.17], abs=0.015)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_differences_of_paired_differences_hold_the_truth(seeds):
    """Four models see images of the same difficulty; seeds shift a model's skill, all images share the seeds. (AT - ST) - (AT' - ST')."""
    random, trials, skills, between = np.random.default_rng(0), 1000, np.array([0.9, 0.3, 0.8, 0.6]), 0.15 * (seeds > 1)
    normal = scipy.stats.norm()
    truth = float(normal.cdf(skills / math.sqrt(1 + 3 + between**2)) @ [1, -1, -1, 1])
    hits = 0
    for _ in range(trials):
        difficulty = random.normal(0, math.sqrt(3), IMAGES)
        each = []
        for _ in range(seeds):
            skill = skills + random.normal(0, between, 4) if between else skills
            first, second, third, fourth = (share(difficulty + random.normal(size=IMAGES) < own) for own in skill)
            each.append(difference(difference(first, second), difference(third, fourth)))
        low, high = over_seeds(each).interval
        hits += low <= truth <= high
    assert 0.94 <= hits / trials <= (0.965 if seeds == 1 else 0.995)


def test_swapping_the_models_mirrors_the_interval_of_a_difference_of_differences():
    models = np.random.default_rng(0).random((4, 60)) < np.array([[0.9], [0.8], [0.95], [0.9]])
    first, second, third, fourth = map(share, models)
    low, high = difference(difference(first, second), difference(third, fourth)).interval
    assert difference(difference(third, fourth), difference(first, second)).interval == pytest.approx((-high, -low))


def test_many_images_make_the_interval_that_of_a_t_test():
    """Of a difference of differences, whose values are -2 to 2: the central limit theorem."""
    models = np.random.default_rng(1).random((4, 20_000)) < np.array([[0.9], [0.6], [0.8], [0.7]])
    first, second, third, fourth = map(share, models)
    expected = scipy.stats.ttest_1samp(models.T.astype(float) @ [1, -1, -1, 1], 0).confidence_interval()
    assert difference(difference(first, second), difference(third, fourth)).interval == pytest.approx(expected, abs=2e-5)


def test_which_images_a_model_has_right_decides_not_how_many():
    right = np.arange(100) < 80
    same, other = difference(share(right), share(right)), difference(share(right), share(right[::-1]))
    assert same.value == other.value == 0 and np.diff(same.interval).item() < 0.3 * np.diff(other.interval).item()


def test_the_pairs_of_a_comparison_are_tested_exactly():
    """Against the binomial by hand: 5 to 0 is 2 * 0.5^5. The difference is of the accuracies, and its interval of the same pairs."""
    one, other = np.array([True] * 5 + [False, True]), np.array([False] * 5 + [False, True])
    found = mcnemar(one, other)
    assert (found["broken_by_winner_only"], found["broken_by_default_only"], found["p"]) == (5, 0, pytest.approx(2 * 0.5**5))
    # Tango's interval (1998) for 0 against 5 of 7 pairs, by bisection of his score statistic.
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((-5 / 7, -0.917781, -0.106862), abs=1e-5)
    assert mcnemar(one, one)["p"] == 1.0 and mcnemar(one, one)["high"] > 0
