"""Flags and curves of the report come from the records of the models that have them."""

from __future__ import annotations

import pytest

from advml.report.figures import corruptions, flags, security, unjudged

POINTS = [{"epsilon": epsilon, "accuracy": 0.5, "low": 0.4, "high": 0.6} for epsilon in (0.0, 0.2, 1.0)]


def record(*names: str, **evidence: object) -> dict:
    found = {"flags": [{"name": name, "saw": f"saw {name}", "try": "more"} for name in names]}
    return {"diagnostics": found | {"evidence": {"epsilon": 0.2, "classes": 4, "largest_class": 0.3, "curve": POINTS, **evidence}}}


EVALUATED = {
    "CL-ST-s0": record("randomised", "success_lost"),
    "CL-AT-s0": record(),
    "SL-ST-s1": record("dead_gradients"),
    "SL-ST-s0": {"diagnostics": {"flags": [], "skipped": "diagnostics.images = 0"}},
    "SL-AT-s0": {},
}
ROWS = [dict(zip(("scheme", "regime", "seed"), name.split("-"), strict=True)) | {"model": name} for name in EVALUATED]
ROWS = [row | {"seed": int(row["seed"][1:])} for row in ROWS]


def test_every_flag_of_every_model_is_listed_with_its_model():
    assert [(flag["model"], flag["name"]) for flag in flags(EVALUATED)] == [
        ("CL-ST-s0", "randomised"),
        ("CL-ST-s0", "success_lost"),
        ("SL-ST-s1", "dead_gradients"),
    ]
    assert flags(EVALUATED)[0] == {"model": "CL-ST-s0", "name": "randomised", "saw": "saw randomised", "try": "more"}


def test_the_curves_are_those_of_one_seeds_models_that_were_judged():
    figure = security(ROWS, EVALUATED, seed=0)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["CL"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn["ST"] == drawn["AT"] == [50, 50, 50] and [30, 30] in drawn.values()  # guessing the most frequent of four classes
    assert figure.axes[0].lines[0].get_xdata()[1] == pytest.approx(1)  # epsilon of the evidence
    assert [axes.get_title(loc="left") for axes in security(ROWS, EVALUATED, seed=1).axes] == ["SL"]


def test_models_that_nobody_could_judge_are_listed_with_the_reason():
    older = {"SL-AT-s1": {"diagnostics": {"flags": []}}}
    assert unjudged(EVALUATED | older) == {"SL-ST-s0": "diagnostics.images = 0", "SL-AT-s1": "it was measured by an older version"}


def test_minimal_distances_are_drawn_beside_pgd_whoever_else_has_none():
    nearest = [{"epsilon": point["epsilon"], "accuracy": 0.3, "pgd": 0.5} for point in POINTS]
    found = record()
    found["diagnostics"]["minimal"] = {"attack": "fmn", "curve": nearest}
    figure = security(ROWS, EVALUATED | {"CL-ST-s0": found}, seed=0)
    drawn = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert drawn.count([30, 30, 30]) == 1 and drawn.count([50, 50, 50]) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ST", "AT", "by FMN"]


def test_there_are_no_curves_where_nobody_was_judged():
    assert security(ROWS, EVALUATED, seed=2) is None and security(ROWS, {}, seed=0) is None and security([], EVALUATED, seed=0) is None


def test_corruptions_are_drawn_of_the_models_that_were_measured_under_them():
    assert corruptions(ROWS) is None
    figure = corruptions([ROWS[0] | {"corruption/fog": 0.4, "corruption/mean": 0.4}, *ROWS[1:]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["CL-ST-s0"]
