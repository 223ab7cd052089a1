"""Optuna's figures with room for what stands on them."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from advml.figures.searches import legible
from advml.figures.style import to_png


def sliced(keys: int) -> Figure:
    """Panels side by side and a colour bar, as `plot_slice` makes them."""
    figure = Figure(figsize=(6.4, 4.8))
    for axes, number in zip(figure.subplots(1, keys + 1), range(keys + 1), strict=True):
        axes.set_xlabel(f"a_key_with_a_long_name_{number}")
        axes.set_title("Slice Plot")
    return figure


@pytest.mark.parametrize("keys", [2, 11])
def test_the_figure_grows_with_its_keys_and_has_one_title(keys):
    figure = legible(sliced(keys), keys=keys, title="a search")
    assert figure.get_size_inches()[0] == pytest.approx(max(8.0, 2.6 * keys if keys > 2 else 1.3 * keys))
    assert figure.get_suptitle() == "a search" and not any(axes.get_title() for axes in figure.axes)


def test_the_minor_ticks_of_a_logarithmic_axis_have_no_labels():
    figure = Figure()
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(1, 5)
    legible(figure, keys=1, title="")
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


def test_labels_that_stick_out_are_drawn_whole():
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.subplots()
    axes.set_yticks([0.5], ["a name that is far longer than the margin at the left"])
    assert imread(io.BytesIO(to_png(figure, dpi=100, whole=True))).shape[1] > imread(io.BytesIO(to_png(figure, dpi=100))).shape[1]
