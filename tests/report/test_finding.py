"""The two sentences that open the report."""

from __future__ import annotations

import numpy as np
import pytest

from advml.report.finding import finding
from advml.similarity.statistics import Estimate


def row(scheme: str, regime: str, worst: float, *, seed: int = 0, **more: float) -> dict:
    ends = {"accuracy/worst_case/low": worst - 0.05, "accuracy/worst_case/high": worst + 0.05}
    return {"scheme": scheme, "regime": regime, "seed": seed, "accuracy/worst_case": worst, "accuracy/clean": 0.99, **ends, **more}


TABLE = [row("SL", "ST", 0.02), row("CL", "ST", 0.01), row("SL", "AT", 0.7), row("CL", "AT", 0.4)]
TABLE += [row("SL", "Full-AT", 0.75), row("CL", "Full-AT", 0.8)]
CLAIMS = {"seeds": [0], "claims": [{"verdict": f"{word} for this seed"} for word in ("contradicted", "supported", "supported")]}


def test_it_tells_the_most_robust_model_what_full_at_adds_and_how_the_claims_fare():
    first, second = finding(TABLE, CLAIMS, threat_model="0.15 (L-infinity)")
    assert "2.0 %" in first and "0.15 (L-infinity)" in first and "CL Full-AT, has 80.0 % [75.0, 85.0], and 99.0 % without attack" in first
    assert "+40.0 points for CL and +5.0 points for SL" in second
    assert second.endswith("three claims two are supported and one is contradicted, by one seed.")


@pytest.mark.parametrize(
    ("paired", "told"),
    [
        ({}, "; one other is not significantly less robust: SL Full-AT."),  # 75.0 is in the interval of 80.0
        ({"SL Full-AT": 0.1}, "; one other is not significantly less robust: SL Full-AT."),
        ({"SL Full-AT": 0.001}, "99.0 % without attack."),
        ({"SL AT": 0.3}, "; two others are not significantly less robust: SL Full-AT and SL AT."),
    ],
    ids=["unpaired", "within", "significant", "both"],
)
def test_models_that_are_not_significantly_less_robust_than_the_best_are_named(paired, told):
    def minus(best, other):
        value = dict(zip(((row["scheme"], row["regime"]) for row in TABLE), (row["accuracy/worst_case"] for row in TABLE), strict=True))
        noise = paired.get(" ".join(other))
        assert best == ("CL", "Full-AT")
        return None if noise is None else Estimate(value[best] - value[other], noise * np.array([-1.0, 1, -1, 1, -1, 1]))

    first, _ = finding(TABLE, CLAIMS, threat_model="1", minus=minus)
    assert first.endswith(told)


def test_seeds_are_averaged_and_flags_are_told():
    seeds = [row("SL", "AT", worst, seed=seed, **{"diagnostics/flags": seed}) for seed, worst in enumerate((0.6, 0.8))]
    (only,) = finding(seeds, {"seeds": [0, 1], "claims": []}, threat_model="1")
    assert "70.0 % (mean of 2 seeds, 60.0 to 80.0)" in only and "flags" in only


def test_what_no_model_exceeds_is_the_most_of_any_seed():
    seeds = [row("EMP", "ST", worst, seed=seed) for seed, worst in enumerate((0.02, 0.06))]
    (only,) = finding(seeds, {"seeds": [0, 1], "claims": []}, threat_model="1")
    assert only == "Without adversarial training no model has more than 6.0 % of the test images correct under all attacks with ε = 1."


@pytest.mark.parametrize("table", [[], [{"scheme": "SL", "regime": "ST", "seed": 0, "accuracy/clean": 1.0}]])
def test_what_was_not_measured_is_not_told(table):
    assert finding(table, {"seeds": [0], "claims": []}, threat_model="1") == []


def verdicts(*words: str) -> dict:
    return {"seeds": [0], "claims": [{"verdict": word if word == "not tested" else f"{word} for this seed"} for word in words]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["supported"] * 2, "Each of the paper's two claims is supported, by one seed."),
        (["not tested", "supported"], "Of the paper's two claims one is supported, by one seed, and one is not tested."),
        (["not tested"] * 2, "None of the paper's two claims is tested."),
    ],
    ids=["all", "some", "none"],
)
def test_the_sentence_on_verdicts_reads_well_whether_all_some_or_no_claims_are_tested(words, told):
    assert finding([], verdicts(*words), threat_model="1") == [told]


def test_a_model_at_chance_is_named_and_is_not_the_most_robust():
    constant = row("SL", "AT", 0.9, at_chance=True), row("SL", "ST", 0.9, at_chance=True)
    first, second = finding([*constant, row("CL", "AT", 0.4), row("CL", "ST", 0.01)], verdicts(), threat_model="1")
    assert "CL AT, has 40.0 %" in first and "1.0 %" in first and "90.0" not in first and "SL" not in first
    assert second.startswith("SL AT and SL ST are no better than chance")


def test_one_seed_at_chance_leaves_out_all_seeds_so_that_no_mean_is_over_the_lucky_ones():
    (only,) = finding([row("SL", "AT", 0.1, at_chance=True), row("SL", "AT", 0.8, seed=1)], verdicts(), threat_model="1")
    assert only.startswith("No model is better than chance") and "robust model" not in only
