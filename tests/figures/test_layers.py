"""Heatmaps and curves, read back from the drawn figures."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from advml.figures.curves import Curve, curve_grid, layer_curves
from advml.figures.layers import Heatmap, heatmaps, stages
from advml.figures.style import regime_colours
from advml.recipes import REGIMES

NAMES = ("encoder.conv1", "encoder.layer1.0", "encoder.layer1.1", "encoder.layer2.0", "classifier")


def curve(label: str, *, shift: float = 0.0, names: tuple[str, ...] = NAMES) -> Curve:
    depth = np.linspace(0, 1, len(names))
    return Curve(label, names, 0.9 - 0.5 * depth - shift, (0.8 - 0.1 * depth).tolist(), (0.3 - 0.2 * depth).tolist())


def lines(axes) -> dict[str, tuple[np.ndarray, str]]:
    return {line.get_label(): (np.asarray(line.get_ydata()), to_hex(line.get_color())) for line in axes.get_lines()}


# Heatmaps


def test_a_heatmap_is_its_matrix_from_zero_to_one_with_the_origin_below():
    matrix = np.random.default_rng(0).uniform(-0.1, 1.1, size=(3, 5))
    figure = heatmaps([Heatmap(matrix, "a", NAMES[:3], NAMES, "clean", "adversarial"), None], columns=2)
    axes, empty = figure.axes[:2]
    (image,) = axes.get_images()
    np.testing.assert_array_equal(np.asarray(image.get_array()), matrix)
    assert image.origin == "lower" and image.get_clim() == (0, 1)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("clean", "adversarial") and not empty.get_images()


def test_stages_begin_where_their_first_layer_is():
    assert stages(NAMES) == [(0, "stem"), (1, "layer1"), (3, "layer2"), (4, "classifier")]


# Curves of one model


def test_curves_of_a_model_are_its_numbers():
    diagonal = np.array([1.0, 0.8, 0.6, -0.3, 0.5])
    figure = layer_curves(NAMES, diagonal, {"clean": [0.9] * 5, "adversarial": [0.4] * 5}, title="model", chance=0.1)
    left, right = figure.axes
    np.testing.assert_array_equal(left.get_lines()[0].get_ydata(), diagonal)
    drawn = lines(right)
    np.testing.assert_allclose(drawn["clean images"][0], 90) and np.testing.assert_allclose(drawn["adversarial"][0], 40)
    assert left.get_ylim()[0] < -0.3


# Curves of all models


def test_every_line_is_its_models_and_every_panel_its_quantity():
    figure = curve_grid({"CL": [curve("ST", shift=0.1), curve("AT")]})
    for axes, name, scale in zip(figure.axes, ("clean_adversarial", "clean", "adversarial"), (1, 100, 100), strict=True):
        for each in (curve("ST", shift=0.1), curve("AT")):
            np.testing.assert_allclose(lines(axes)[each.label][0], scale * np.asarray(getattr(each, name)))
    FigureCanvasAgg(figure).draw()
    titles = [axes._left_title for axes in figure.axes]
    assert [title.get_text().split()[-1] for title in titles] == ["adversarial", "clean", "adversarial"]
    assert all(title.get_window_extent().x1 < figure.bbox.x1 for title in titles)


def test_a_regime_has_its_colour_whichever_models_are_missing():
    figure = curve_grid({"SL": [curve("AT"), curve("odd")], "CL": [curve(regime) for regime in REGIMES], "SCL": [curve("even")]})
    drawn = [{label: colour for label, (_, colour) in lines(figure.axes[3 * row]).items()} for row in range(3)]
    colours = regime_colours(["odd", "even"])
    assert len(set(colours.values())) == len(REGIMES) + 2 and regime_colours([]).items() <= colours.items()
    assert drawn == [{name: colours[name] for name in names} for names in (("AT", "odd"), REGIMES, ("even",))]


def test_more_models_than_colours_are_all_drawn():
    assert len(lines(curve_grid({"CL": [curve(f"model {number}") for number in range(7)]}).axes[0])) == 7


def test_negative_values_are_not_cut_off():
    axes = curve_grid({"CL": [curve("ST", shift=1.5)]}).axes[0]
    assert axes.get_ylim()[0] < -1.0 < axes.get_ylim()[1]


def test_a_model_without_values_does_not_upset_the_axis():
    nothing = Curve("ST", NAMES, np.full(5, np.nan), [0.1] * 5, [0.1] * 5)
    assert curve_grid({"CL": [nothing]}).axes[0].get_ylim() == pytest.approx((-0.02, 1.03))


def test_ticks_are_of_the_curves_own_layers():
    same = curve_grid({"CL": [curve("ST"), curve("AT")]}).axes[0]
    labels = [label.get_text() for label in same.get_xticklabels()]
    assert labels == ["stem", "layer1", "layer2", "classifier"] and same.get_xticks() == pytest.approx([0, 0.25, 0.75, 1])
    different = curve_grid({"CL": [curve("ST"), curve("AT", names=NAMES[:3])]}).axes[0]
    assert different.get_xlabel() == "depth" and "layer1" not in [label.get_text() for label in different.get_xticklabels()]
    assert [line.get_xdata()[-1] for line in different.get_lines()] == [1, 1]
