"""Security curves hold the numbers they were given, and the matrix of corruptions every share in its cell."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from advml.figures.robustness import corruption_matrix, security_curves
from advml.figures.style import regime_colours, to_png

EPSILONS = (0.0, 0.1, 0.4)


def points(*accuracies: float) -> list[dict[str, float]]:
    listed = zip(EPSILONS, accuracies, strict=True)
    return [{"epsilon": epsilon, "accuracy": share, "low": share - 0.05, "high": share + 0.04} for epsilon, share in listed]


MODELS = {"CL": {"ST": points(0.9, 0.3, 0.1), "Full-AT": points(0.8, 0.7, 0.2)}, "SL": {"tuned": points(0.9, 0.5, 0.1)}}


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_a_panel_per_scheme_holds_a_line_per_regime_with_its_numbers_and_its_colour():
    figure = security_curves(MODELS, epsilon=0.1, chance=0.25)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["CL", "SL"]
    for axes, regimes in zip(figure.axes, MODELS.values(), strict=True):
        assert list(lines(axes)) == list(regimes)
        for regime, line in lines(axes).items():
            assert line.get_xdata() == pytest.approx([0, 1, 2])  # the root of epsilon, as a multiple of the study's
            assert line.get_ydata() == pytest.approx([100 * point["accuracy"] for point in regimes[regime]])
            assert to_hex(line.get_color()) == regime_colours(["tuned"])[regime]


def test_minimal_distances_are_crosses_in_the_colour_of_their_regime_with_one_entry_in_the_legend():
    nearest = {"CL": {"ST": points(0.9, 0.2, 0.0), "Full-AT": points(0.8, 0.6, 0.1)}}
    figure = security_curves(MODELS, epsilon=0.1, chance=0.25, nearest=nearest, attack="FMN")
    crosses = [[line for line in axes.lines if line.get_marker() == "x"] for axes in figure.axes]
    assert [len(found) for found in crosses] == [2, 0]
    for line, (regime, found) in zip(crosses[0], nearest["CL"].items(), strict=True):
        assert line.get_xdata() == pytest.approx([0, 1, 2])
        assert line.get_ydata() == pytest.approx([100 * point["accuracy"] for point in found])
        assert to_hex(line.get_color()) == regime_colours([])[regime]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ST", "Full-AT", "tuned", "by FMN"]


def test_the_band_spans_the_interval_in_the_colour_of_its_line():
    axes = security_curves(MODELS, epsilon=0.1, chance=0.25).axes[0]
    for band, (regime, found) in zip(axes.collections, MODELS["CL"].items(), strict=True):
        corners = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
        for place, point in enumerate(found):
            assert {(place, round(100 * point["low"], 6)), (place, round(100 * point["high"], 6))} <= corners
        assert to_hex(band.get_facecolor()[0]) == regime_colours([])[regime]


def test_epsilon_and_chance_are_marked_and_the_axis_names_the_epsilons():
    for axes in security_curves(MODELS, epsilon=0.1, chance=0.25).axes:
        upright, level = (line for line in axes.lines if line.get_label().startswith("_"))
        assert list(upright.get_xdata()) == [1, 1] and list(level.get_ydata()) == [25, 25]
        assert axes.get_xticks() == pytest.approx([0, 1, 2]) and [label.get_text() for label in axes.get_xticklabels()] == [
            "0",
            "0.1",
            "0.4",
        ]
        low, high = axes.get_ylim()
        assert low == 0 and high >= 100


def test_the_legend_names_every_regime_of_any_scheme_once():
    models = MODELS | {"SCL": MODELS["CL"]}
    (legend,) = security_curves(models, epsilon=0.1, chance=0.25).legends
    assert [text.get_text() for text in legend.get_texts()] == ["ST", "Full-AT", "tuned"]


ROWS = [
    {"model": "CL-ST-s0", "corruption/mean": 0.5, "corruption/fog": 0.31, "corruption/fog/low": 0.2, "corruption/jpeg_compression": 0.69},
    {"model": "SL-AT-s0", "corruption/mean": 0.8, "corruption/jpeg_compression": 0.8, "accuracy/clean": 0.9},
]


def test_every_share_stands_in_its_cell_models_down_and_corruptions_across_the_mean_last():
    (axes,) = corruption_matrix(ROWS).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fog", "jpeg compression", "mean"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["CL-ST-s0", "SL-AT-s0"]
    (image,) = axes.images
    shown = np.ma.filled(image.get_array(), np.nan)
    assert np.array_equal(shown, [[0.31, 0.69, 0.5], [np.nan, 0.8, 0.8]], equal_nan=True)
    assert image.get_clim() == (0, 1)
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "31", (0, 1): "69", (0, 2): "50", (1, 1): "80", (1, 2): "80"}
    (rule,) = axes.lines
    assert list(rule.get_xdata()) == [1.5, 1.5]  # sets the mean apart


def test_the_same_numbers_give_the_same_bytes():
    assert to_png(corruption_matrix(ROWS)) == to_png(corruption_matrix(ROWS))
    assert to_png(security_curves(MODELS, epsilon=0.1, chance=0.25)) == to_png(security_curves(MODELS, epsilon=0.1, chance=0.25))
