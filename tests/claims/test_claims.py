"""The list of claims, and the paper's figures in it."""

from __future__ import annotations

import math

import pytest

from advml.claims.claims import CLAIMS, judge, overall, paper, worded

# The rule that turns intervals into verdicts, on planted outcomes of every kind.

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


# The list of claims, and the paper's figures in it.

# Computed from the CKA matrices (CIFAR-100, ResNet-50, 16 residual blocks) that the authors of arXiv 2302.02502 published with their code.
PUBLISHED = {
    "redundancy": {
        "SL": {"ST": 0.5621, "AT": 0.7613, "Full-AT": 0.7603},
        "CL": {"ST": 0.7215, "AT": 0.8177, "Full-AT": 0.7804},
        "SCL": {"ST": 0.6089, "AT": 0.7534, "Full-AT": 0.7803},
    },
    "long_range": {"CL": {"AT": 0.6757, "Full-AT": 0.5586}},
    "clean_adversarial": {
        "SL": {"ST": 0.7879, "AT": 0.9934},
        "CL": {"ST": 0.5947, "AT": 0.9813},
        "SCL": {"ST": 0.6448, "AT": 0.9931},
    },
    "cross": {"SCL-CL": {"ST": 0.3813, "AT": 0.7125}, "SL-CL": {"ST": 0.3664, "AT": 0.6879}, "SL-SCL": {"ST": 0.3783, "AT": 0.7196}},
    "epsilon": {
        "SL": {"first_quarter": [0.9987, 0.9977], "last_quarter": [0.9349, 0.9787]},
        "CL": {"first_quarter": [0.9732, 0.9944], "last_quarter": [0.9174, 0.9961]},
        "SCL": {"first_quarter": [0.9965, 0.9974], "last_quarter": [0.9372, 0.9911]},
    },
}


def test_the_papers_figures_are_the_published_ones():
    found = {key: content for key, content in paper().items() if key != "source"}
    found["epsilon"] = {key: content for key, content in found["epsilon"].items() if key != "note"}
    assert found == PUBLISHED


def test_there_are_six_claims_and_every_part_has_its_own_name():
    assert len(CLAIMS) == 6 and len({claim.key for claim in CLAIMS}) == 6
    names = [part.name for claim in CLAIMS for part in claim.parts]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("part", [part for claim in CLAIMS for part in claim.parts if part.paper is not None], ids=lambda part: part.name)
def test_the_papers_own_figure_is_on_the_side_that_it_claims(part):
    assert judge((part.paper, part.paper), part.side, part.bound) == "supported"


def test_what_has_a_margin_has_it_on_both_sides():
    """0.02 either way; agreement and accuracies have bounds of their own."""
    bounds = {(part.side, part.bound) for claim in CLAIMS for part in claim.parts}
    assert bounds == {("above", 0.02), ("below", -0.02), ("above", -0.02), ("above", 0.0), ("above", 0.9), ("below", 0.9)}
    assert {part.name for claim in CLAIMS for part in claim.parts if part.bound == 0} == {
        part
        for label in ("accuracy under threat model II", "worst-case accuracy")
        for part in (
            f"CL: {label}, Full-AT minus AT",
            *(f"gain in {label} (Full-AT minus AT), CL minus {scheme}" for scheme in ("SL", "SCL")),
        )
    }
