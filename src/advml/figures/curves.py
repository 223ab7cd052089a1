"""Curves over layers: CKA between clean and adversarial images, and accuracy of linear probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advml.figures.layers import LONGEST, stages
from advml.figures.style import ADVERSARIAL, FULL, INK, QUIET, regime_colours, styled


def _apart(begins: list[tuple[int, str]], distance: float) -> list[tuple[int, str]]:
    """Drop stages whose labels would overlap with the next one."""
    following = [start for start, _ in begins[1:]] + [float("inf")]
    return [(start, stage) for (start, stage), after in zip(begins, following, strict=True) if after - start > distance]


@styled
def layer_curves(
    names: Sequence[str], clean_adversarial: np.ndarray, probes: Mapping[str, Sequence[float]], *, title: str, chance: float
) -> Figure:
    """Draw the effect of the attack on each layer: CKA between clean and adversarial images, and accuracy of linear probes.

    Args:
        names: of the L layers, in execution order.
        clean_adversarial: (L,) CKA of each layer between clean and adversarial images.
        probes: accuracies (L,) on `clean` and `adversarial` images.
        chance: accuracy of guessing.
    """
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    left, right = figure.subplots(1, 2)
    depth = range(len(names))
    left.plot(depth, clean_adversarial, color=INK, marker="o", markersize=2.5)
    left.set_title("CKA between clean and adversarial images", loc="left")
    right.plot(depth, [100 * value for value in probes["clean"]], color=FULL, marker="o", markersize=2.5, label="clean images")
    right.plot(depth, [100 * value for value in probes["adversarial"]], color=ADVERSARIAL, marker="o", markersize=2.5, label="adversarial")
    right.axhline(100 * chance, color=QUIET, linestyle=":", linewidth=0.9)
    right.annotate("chance", (0, 100 * chance), (0, 2), textcoords="offset points", fontsize=7, color=QUIET)
    right.set_title("linear probe, accuracy in %", loc="left")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    left.set_ylim(_lowest([np.asarray(clean_adversarial)], margin=0.02), 1.03)
    right.set_ylim(0, 103)
    for axes in (left, right):
        axes.grid(axis="y")
        axes.set_xlabel("layer, from input to output")
        begins = _apart(stages(names), len(names) / 25)
        axes.set_xticks([start for start, _ in begins], [stage[:LONGEST] for _, stage in begins], rotation=40, ha="right", fontsize=7.5)
        axes.set_xlim(-0.5, len(names) - 0.5)
    return figure


@dataclass(frozen=True)
class Curve:
    """One model in a grid of curves: regime, names of layers, their CKA, and accuracies of their probes in [0, 1]."""

    label: str
    names: Sequence[str]
    clean_adversarial: np.ndarray
    clean: Sequence[float]
    adversarial: Sequence[float]


def _along(curve: Curve) -> np.ndarray:
    """Positions of a curve's layers from 0 to 1, so that networks of different depth share one axis."""
    return np.linspace(0, 1, len(curve.names)) if len(curve.names) > 1 else np.zeros(1)


def _depth_axis(axes: Axes, networks: Sequence[Sequence[str]]) -> None:
    """Label the axis with stages if all networks have the same layers, else with relative depth."""
    axes.set_xlim(-0.02, 1.02)
    if len({tuple(names) for names in networks}) != 1:
        axes.set_xlabel("depth")
        return
    names = networks[0]
    begins = _apart(stages(names), len(names) / 14)
    places = [start / max(len(names) - 1, 1) for start, _ in begins]
    axes.set_xticks(places, [stage[:LONGEST] for _, stage in begins], rotation=35, ha="right", fontsize=7)


def _lowest(curves: Sequence[np.ndarray], *, margin: float) -> float:
    """Lower end of an axis: below 0, and below every value."""
    return min([0.0, *(float(np.nanmin(values)) for values in curves if np.isfinite(values).any())]) - margin


@styled
def curve_grid(groups: Mapping[str, Sequence[Curve]]) -> Figure:
    """Draw clean-adversarial CKA and probe accuracies over layers, with a row per scheme and a line per regime.

    Args:
        groups: models by scheme. A regime keeps its colour, whichever other regimes are drawn.
    """
    figure = Figure(figsize=(9.6, 2.3 * len(groups) + 0.7), layout="constrained")
    grid = figure.subplots(len(groups), 3, squeeze=False)
    colours = regime_colours(curve.label for curves in groups.values() for curve in curves)
    titles = ("CKA, clean with adversarial", "probe accuracy in %, clean", "probe accuracy in %, adversarial")
    for line, (group, curves) in zip(grid, groups.items(), strict=True):
        for axes, values in zip(line, ("clean_adversarial", "clean", "adversarial"), strict=True):
            scale = 1 if values == "clean_adversarial" else 100
            for curve in curves:
                axes.plot(
                    _along(curve), scale * np.asarray(getattr(curve, values)), color=colours[curve.label], linewidth=1.3, label=curve.label
                )
            _depth_axis(axes, [curve.names for curve in curves])
            axes.set_ylim(_lowest([scale * np.asarray(getattr(curve, values)) for curve in curves], margin=0.02 * scale), 1.03 * scale)
            axes.grid(axis="y")
        line[0].set_ylabel(group, fontweight="bold")
    for first, last, title in zip(grid[0], grid[-1], titles, strict=True):
        first.set_title(title, loc="left", fontsize=9)
        last.set_xlabel(last.get_xlabel() or "layer, from input to output")
    handles = {label: handle for axes in grid[:, 0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure
