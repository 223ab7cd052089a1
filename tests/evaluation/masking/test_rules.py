"""Each rule fires just above its threshold and not at it, says the numbers, and no rule fires on what chance explains."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from advml.evaluation.intervals import wilson
from advml.evaluation.masking.evidence import Evidence, Point, Rise
from advml.evaluation.masking.rules import RULES, at_chance, flags


def curve(*right: int, images: int = 100) -> tuple[Point, ...]:
    epsilons = (0.0, 0.05, 0.1, 1.0)
    return tuple(Point(e, count, count / images, *wilson(count, images)) for e, count in zip(epsilons, right, strict=True))


def margins(*, late: float, steps: int = 20) -> tuple[float, ...]:
    """From -10 to 0, of which the last tenth of the steps gives the share `late`."""
    last = max(1, round(steps / 10))
    return (-10.0, *[-10 * late] * (steps - last), *[0.0] * last)


SOUND = Evidence(
    norm="linf",
    epsilon=0.1,
    steps=20,
    seed=0,
    classes=10,
    largest_class=0.1,
    images=100,
    n=100,
    curve=curve(100, 80, 60, 0),
    rise=Rise(0.1, 1.0, regained=1, lost=60, pairs=15),
    single_step_only=1,
    multi_step_only=20,
    white_box_right=55,
    black_box={"random noise": 0, "square": 1},
    zero_clean=0,
    zero_random=0,
    zero_margin=0,
    non_finite=0,
    gradient_error=None,
    slope_kept=0.98,
    margins=margins(late=0.01),
    survivors=60,
    broken=40,
    lost=0,
    batch_difference=1e-6,
    output_difference=0.0,
    predictions_changed=0,
    output_low=-8.0,
    output_sum=0.5,
    output_sum_spread=12.0,
    output_log_sum_exp=9.0,
    forward=240.0,
    backward=125.0,
)
SHARES = {"output_low": 0.0, "output_sum": 1.0, "output_log_sum_exp": 2.3}

# flag, what raises nothing, what raises it, a number that it must say
LINES = [
    ("curve_not_monotone", {"rise": Rise(0.1, 1.0, 10, 0, 15)}, {"rise": Rise(0.1, 1.0, 11, 0, 15)}, "11 of 100"),
    ("curve_not_monotone", {"rise": Rise(0.1, 1.0, 20, 5, 60)}, {"rise": Rise(0.1, 1.0, 20, 2, 60)}, "20 of 100"),
    ("curve_above_chance", {"curve": curve(90, 80, 60, 18)}, {"curve": curve(90, 80, 60, 19)}, "0.190 (at least 0.125)"),
    (
        "curve_above_chance",
        {"largest_class": 0.5, "curve": curve(90, 80, 60, 61)},  # as good as always saying the most frequent class
        {"largest_class": 0.5, "curve": curve(90, 80, 60, 63)},
        "is 0.5",
    ),
    (
        "curve_above_chance",
        {"classes": 1000, "largest_class": 0.0, "curve": curve(9, 9, 9, 11)},
        {"classes": 1000, "largest_class": 0.0, "curve": curve(9, 9, 9, 12)},
        "0.001",
    ),
    ("single_step_stronger", {"single_step_only": 6, "multi_step_only": 0}, {"single_step_only": 7, "multi_step_only": 0}, "7 of 100"),
    ("black_box_stronger", {"black_box": {"square": 4}}, {"black_box": {"noise": 4, "square": 5}}, "square 5 of 100"),
    ("figure_too_high", {"n": 100, "figure_broken": 4}, {"n": 100, "figure_broken": 5}, "5 of 100"),
    ("black_box_stronger", {"n": 10, "black_box": {"square": 1}}, {"n": 10, "black_box": {"square": 2}}, "square 2 of 10"),
    ("dead_gradients", {"zero_clean": 5, "zero_random": 5}, {"zero_clean": 6, "zero_random": 5}, "6 at the image and 5"),
    ("dead_gradients", {"zero_margin": 100}, {"zero_random": 6}, "6 at a random point"),
    ("dead_gradients", {}, {"non_finite": 1}, "for 1"),
    ("misleading_gradients", {"slope_kept": 0.25}, {"slope_kept": 0.249}, "24.9%"),
    ("misleading_gradients", {"slope_kept": None}, {"slope_kept": -1.0}, "-100.0%"),
    ("loss_still_rising", {"margins": margins(late=0.059)}, {"margins": margins(late=0.061)}, "last 2 of 20 steps give 6%"),
    (
        "loss_still_rising",
        {"margins": margins(late=0.14, steps=4), "steps": 4},
        {"margins": margins(late=0.16, steps=4), "steps": 4},
        "16%",
    ),
    ("loss_still_rising", {"margins": margins(late=1), "survivors": 4}, {"margins": margins(late=1), "survivors": 5}, "5 samples"),
    ("success_lost", {"lost": 4}, {"lost": 5}, "5 of the 40"),
    ("success_lost", {"batch_difference": 0.02}, {"batch_difference": 0.021}, "0.021"),
    ("randomised", {"output_difference": 1e-4}, {"output_difference": 1.1e-4}, "0.00011"),
    ("randomised", {}, {"predictions_changed": 1}, "1 predictions"),
    ("softmax_output", SHARES | {"output_sum_spread": 2e-3}, SHARES | {"output_sum_spread": 1e-3}, "sums to 1"),
    (
        "softmax_output",
        SHARES | {"output_low": -1e-3, "output_sum_spread": 0.0},
        SHARES | {"output_sum_spread": 0.0},
        "below 0",
    ),
    ("softmax_output", {"output_log_sum_exp": 1.1e-3}, {"output_log_sum_exp": 1e-3}, "log-probabilities"),
]


def test_sound_evidence_raises_no_flag():
    assert flags(SOUND) == []


@pytest.mark.parametrize(("name", "below", "above", "says"), LINES, ids=[f"{line[0]}-{number}" for number, line in enumerate(LINES)])
def test_a_rule_fires_above_its_threshold_and_not_at_it(name, below, above, says):
    assert name not in [flag.name for flag in flags(replace(SOUND, **below))]
    (flag,) = flags(replace(SOUND, **above))
    assert flag.name == name and says in flag.saw and flag.try_


def test_every_rule_has_a_line():
    assert {rule.__name__ for rule in RULES} == {line[0] for line in LINES}


def test_outputs_that_differ_in_another_batch_no_more_than_in_the_same_one_are_random_not_lost():
    found = flags(replace(SOUND, batch_difference=0.3, output_difference=0.2))
    assert [flag.name for flag in found] == ["randomised"]


def test_saturation_is_told_from_a_layer_without_gradient():
    (saturated,) = flags(replace(SOUND, zero_clean=90, zero_margin=0))
    (flat,) = flags(replace(SOUND, zero_clean=90, zero_margin=90, gradient_error="no grad_fn"))
    assert "margin or DLR" in saturated.try_ and "BPDA" in flat.try_ and "no grad_fn" in flat.saw


def test_without_any_sample_no_rule_fires():
    nothing = {"n": 0, "survivors": 0, "broken": 0, "margins": (), "black_box": {"random noise": 0}, "slope_kept": None}
    assert flags(replace(SOUND, **nothing, rise=Rise(0.1, 0.1, 0, 0, 1), curve=curve(0, 0, 0, 0), single_step_only=0)) == []


def test_evidence_and_flags_are_json():
    evidence = replace(SOUND, margins=(float("-inf"), 1.0), output_low=float("nan"), predictions_changed=3)
    record = json.loads(json.dumps(evidence.as_record(), allow_nan=False))
    assert record["margins"] == [None, 1.0] and record["output_low"] is None
    assert record["curve"][1] == {"epsilon": 0.05, "right": 80, "accuracy": 0.8, "low": wilson(80, 100)[0], "high": wilson(80, 100)[1]}
    assert record["rise"]["regained"] == 1 and record["black_box"]["square"] == 1
    assert set((flags(evidence)[-1]).as_record()) == {"name", "saw", "try"}


@pytest.mark.parametrize(
    ("correct", "classes", "flagged"),
    [
        (10, [10] * 10, True),  # a constant
        (0, [50, 50], True),
        (15, [10] * 10, True),
        (16, [10] * 10, False),
        (80, [80, 20], True),  # always the most frequent class, which one in K would overlook
        (89, [80, 20], False),
        (100, [100, 0], True),
    ],
)
def test_a_model_whose_interval_reaches_the_share_of_the_most_frequent_class_is_at_chance(correct, classes, flagged):
    assert [flag.name for flag in at_chance(correct, classes)] == ["at_chance"] * flagged


def test_images_of_a_single_class_are_no_reason_to_doubt_an_attack():
    assert flags(replace(SOUND, largest_class=1.0, curve=curve(100, 100, 100, 100), n=100)) == []
