"""Intervals of shares, and tails of the binomial."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from advml.evaluation.intervals import binomial_tail, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 360), (360, 360), (1, 360), (270, 360), (9984, 10000)])
def test_wilson_equals_scipys(successes, n):
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("n", "share"), [(1, 0.5), (40, 0.01), (359, 0.5), (10_000, 0.1)])
def test_the_binomial_tail_is_that_of_the_exact_test_however_far_out(n, share):
    for successes in {0, 1, n // 100, n // 20, n // 5, n}:
        expected = binomtest(successes, n, share, alternative="greater").pvalue
        assert binomial_tail(successes, n, share=share) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_without_trials_nothing_is_unlikely_but_a_success():
    assert binomial_tail(0, 0, share=0.5) == 1 and binomial_tail(1, 0, share=0.5) == 0
