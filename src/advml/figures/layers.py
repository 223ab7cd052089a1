"""Layers of one model, and layers of two models: CKA as heatmaps, its diagonal and linear probes as curves.

All heatmaps share one scale, from 0 to 1, and have their origin below on the left, like the figures of the paper.
Along the axes stand stages (`layer3`, `blocks.2`, the heads), not layers: fifty names would be unreadable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advml.figures.style import ADVERSARIAL, FULL, INK, QUIET, styled

COLOURS = "magma"
LONGEST = 10  # letters of a stage's name


@dataclass(frozen=True)
class Heatmap:
    """One matrix and what stands around it. `rows` and `columns` are names of layers."""

    matrix: np.ndarray
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str = ""
    column_label: str = ""


def stages(names: Sequence[str]) -> list[tuple[int, str]]:
    """Where each stage begins: [(0, 'stem'), (3, 'layer1'), ...]. Layers before the first stage are the stem."""
    found: list[tuple[int, str]] = []
    for number, name in enumerate(names):
        stage = _stage(name)
        if not found or found[-1][1] != stage:
            found.append((number, stage))
    return found


def _stage(name: str) -> str:
    path = name.removeprefix("encoder.").split(".")
    if name == "encoder" or path[0] in ("global_pool", "fc_norm", "norm", "head"):
        return "output"
    if path[0] == "projection_head":
        return "projection"
    if path[0] in ("blocks", "stages", "layers") and len(path) > 1:
        return ".".join(path[:2])
    is_stem = path[0] in ("conv1", "bn1", "act1", "conv_stem", "stem", "patch_embed", "maxpool", "norm_pre", "pos_drop", "patch_drop")
    return "stem" if is_stem else path[0]


@styled
def heatmaps(panels: Sequence[Heatmap | None], *, title: str = "", columns: int = 3, size: float = 3.0) -> Figure:
    """Matrices side by side in rows of `columns`; None leaves a place empty. Values outside of 0..1 are drawn as the ends."""
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(size * columns + 0.9, (size + 0.25) * lines + (0.35 if title else 0)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11) if title else None
    axes = figure.subplots(lines, columns, squeeze=False)
    image = None
    for place, panel in zip(axes.flat, [*panels, *[None] * (lines * columns - len(panels))], strict=True):
        if panel is None:
            place.axis("off")
        else:
            image = _heatmap(place, panel, distance=0.13 / size)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, pad=0.015)
        bar.set_label("CKA")
        bar.outline.set_visible(False)
    return figure


def _heatmap(axes: Axes, panel: Heatmap, *, distance: float) -> object:
    axes.set_facecolor("#d9d9d9")  # a dead layer has no CKA
    image = axes.imshow(panel.matrix, origin="lower", vmin=0, vmax=1, cmap=COLOURS, interpolation="nearest", aspect="auto")
    axes.set_box_aspect(1)
    axes.set_title(panel.title, loc="left", fontsize=9.5)
    axes.set_ylabel(panel.row_label)
    axes.set_xlabel(panel.column_label)
    _ticks(axes, "y", panel.rows, distance)
    _ticks(axes, "x", panel.columns, distance)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7)
    return image


def _ticks(axes: Axes, which: str, names: Sequence[str], distance: float) -> None:
    """A line where a stage begins, its name in the middle of it; names stand apart by a share `distance` of the axis."""
    begins = stages(names)
    ends = [start for start, _ in begins[1:]] + [len(names)]
    for start, _ in begins[1:]:
        (axes.axhline if which == "y" else axes.axvline)(start - 0.5, color="white", linewidth=0.6, alpha=0.7)
    middles = [(start + end - 1) / 2 for (start, _), end in zip(begins, ends, strict=True)]
    following = [*middles[1:], float("inf")]  # a name that the next one would write over is left out
    shown = [
        stage[:LONGEST] if after - middle > distance * len(names) else ""
        for (_, stage), middle, after in zip(begins, middles, following, strict=True)
    ]
    getattr(axes, f"set_{which}ticks")(middles, shown, rotation=90 if which == "x" else 0)


def _apart(begins: list[tuple[int, str]], distance: float) -> list[tuple[int, str]]:
    """Without the stages that the next one would write over."""
    following = [start for start, _ in begins[1:]] + [float("inf")]
    return [(start, stage) for (start, stage), after in zip(begins, following, strict=True) if after - start > distance]


@styled
def layer_curves(
    names: Sequence[str], clean_adversarial: np.ndarray, probes: Mapping[str, Sequence[float]], *, title: str, chance: float
) -> Figure:
    """What the attack does to each layer: CKA of clean with adversarial inputs, and what a linear probe still reads.

    Args:
        names: of the L layers, in execution order.
        clean_adversarial: (L,) CKA of each layer with itself.
        probes: accuracies (L,) under `clean` and `adversarial`.
        chance: accuracy of guessing.
    """
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    left, right = figure.subplots(1, 2)
    depth = range(len(names))
    left.plot(depth, clean_adversarial, color=INK, marker="o", markersize=2.5)
    left.set_title("CKA, clean with adversarial images", loc="left")
    right.plot(depth, [100 * value for value in probes["clean"]], color=FULL, marker="o", markersize=2.5, label="clean images")
    right.plot(depth, [100 * value for value in probes["adversarial"]], color=ADVERSARIAL, marker="o", markersize=2.5, label="adversarial")
    right.axhline(100 * chance, color=QUIET, linestyle=":", linewidth=0.9)
    right.annotate("chance", (0, 100 * chance), (0, 2), textcoords="offset points", fontsize=7, color=QUIET)
    right.set_title("linear probe, accuracy in %", loc="left")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    low = min(0.0, float(np.nanmin(clean_adversarial))) if np.isfinite(clean_adversarial).any() else 0.0
    left.set_ylim(low - 0.02, 1.03)
    right.set_ylim(0, 103)
    for axes in (left, right):
        axes.grid(axis="y")
        begins = _apart(stages(names), len(names) / 25)
        axes.set_xticks([start for start, _ in begins], [stage[:LONGEST] for _, stage in begins], rotation=40, ha="right", fontsize=7.5)
        axes.set_xlim(-0.5, len(names) - 0.5)
    return figure


@dataclass(frozen=True)
class Curve:
    """One model in a grid of curves. Accuracies are shares."""

    label: str
    names: Sequence[str]
    clean_adversarial: np.ndarray
    clean: Sequence[float]
    adversarial: Sequence[float]


REGIME_COLOURS = ("#6b6b6b", "#e69f00", "#56b4e9", "#0072b2")


@styled
def curve_grid(groups: Mapping[str, Sequence[Curve]]) -> Figure:
    """A row per scheme, a line per regime: clean-adversarial CKA and probe accuracies, layer by layer.

    Args:
        groups: models by scheme, in the regimes' order.
    """
    figure = Figure(figsize=(9.6, 2.3 * len(groups) + 0.7), layout="constrained")
    grid = figure.subplots(len(groups), 3, squeeze=False)
    titles = ("CKA, clean with adversarial images", "linear probe on clean images, %", "linear probe on adversarial images, %")
    for line, (group, curves) in zip(grid, groups.items(), strict=True):
        for axes, values in zip(line, ("clean_adversarial", "clean", "adversarial"), strict=True):
            scale = 1 if values == "clean_adversarial" else 100
            for curve, colour in zip(curves, REGIME_COLOURS, strict=False):
                axes.plot(scale * np.asarray(getattr(curve, values)), color=colour, linewidth=1.3, label=curve.label)
            axes.set_ylim(-0.02 * scale, 1.03 * scale)
            axes.grid(axis="y")
            if curves:
                begins = _apart(stages(curves[0].names), len(curves[0].names) / 14)
                axes.set_xticks(
                    [start for start, _ in begins], [stage[:LONGEST] for _, stage in begins], rotation=35, ha="right", fontsize=7
                )
        line[0].set_ylabel(group, fontweight="bold")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
    handles = {label: handle for axes in grid[:, 0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure
