"""The rule that turns intervals into verdicts, on planted outcomes of every kind."""

from __future__ import annotations

import math

import pytest

from advml.claims.verdicts import judge, overall, worded

CASES = {
    "wholly above": ((0.01, 0.2), "above", 0.0, "supported"),
    "wholly below": ((-0.2, -0.01), "above", 0.0, "contradicted"),
    "across the bound": ((-0.01, 0.2), "above", 0.0, "inconclusive"),
    "an end on the bound": ((0.0, 0.2), "above", 0.0, "inconclusive"),
    "the other end on the bound": ((-0.2, 0.0), "above", 0.0, "inconclusive"),
    "below, as claimed": ((-0.2, -0.01), "below", 0.0, "supported"),
    "above, against the claim": ((0.01, 0.2), "below", 0.0, "contradicted"),
    "across, claimed below": ((-0.01, 0.2), "below", 0.0, "inconclusive"),
    "above a bound that is not zero": ((0.91, 0.95), "above", 0.9, "supported"),
    "below a bound that is not zero": ((0.81, 0.89), "above", 0.9, "contradicted"),
    "a small loss within the margin": ((-0.015, 0.01), "above", -0.02, "supported"),
    "a loss beyond the margin": ((-0.05, -0.03), "above", -0.02, "contradicted"),
    "no interval": ((math.nan, math.nan), "above", 0.0, "inconclusive"),
    "not measured": (None, "above", 0.0, "not tested"),
}


@pytest.mark.parametrize(("interval", "side", "bound", "verdict"), CASES.values(), ids=CASES)
def test_a_part_is_judged_by_where_its_whole_interval_lies(interval, side, bound, verdict):
    assert judge(interval, side, bound) == verdict


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "inconclusive"], "inconclusive"),
        (["supported", "contradicted", "inconclusive"], "contradicted"),
        (["contradicted", "not tested"], "not tested"),
        (["inconclusive"], "inconclusive"),
    ],
)
def test_a_claim_is_as_strong_as_its_weakest_part(parts, verdict):
    assert overall(parts) == overall(parts[::-1]) == verdict


@pytest.mark.parametrize("verdict", ["supported", "contradicted", "inconclusive"])
def test_the_verdict_of_one_training_says_so_in_the_word(verdict):
    assert worded(verdict, seeds=1) == f"{verdict} for this seed"
    assert worded(verdict, seeds=2) == worded(verdict, seeds=10) == verdict


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_was_not_tested_is_that_of_no_seed(seeds):
    assert worded("not tested", seeds=seeds) == "not tested"
