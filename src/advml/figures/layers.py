"""Heatmaps of CKA, or another measure, between the layers of one or two models.

All heatmaps share one scale, from 0 to 1, and have their origin at the lower left, like the figures of the paper. The axes are labelled
with stages (`layer3`, `blocks.2`, the heads), because the names of fifty layers would be unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advml.figures.style import styled

COLOURS = "magma"
LONGEST = 10  # most letters of a stage's name


@dataclass(frozen=True)
class Heatmap:
    """One matrix with title and labels. `rows` and `columns` are names of layers."""

    matrix: np.ndarray
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str = ""
    column_label: str = ""


def stages(names: Sequence[str]) -> list[tuple[int, str]]:
    """First layer and name of each stage: [(0, 'stem'), (3, 'layer1'), ...]. Layers before the first stage are the stem."""
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
def heatmaps(panels: Sequence[Heatmap | None], *, title: str = "", columns: int = 3, size: float = 3.0, measure: str = "CKA") -> Figure:
    """Draw matrices in rows of `columns`; None leaves a place empty. Values outside of 0..1 get the colours of the ends."""
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
        bar.set_label(measure)
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
    """Draw a line at the start of each stage and its name in the middle; names are at least a share `distance` of the axis apart."""
    begins = stages(names)
    ends = [start for start, _ in begins[1:]] + [len(names)]
    for start, _ in begins[1:]:
        (axes.axhline if which == "y" else axes.axvline)(start - 0.5, color="white", linewidth=0.6, alpha=0.7)
    middles = [(start + end - 1) / 2 for (start, _), end in zip(begins, ends, strict=True)]
    following = [*middles[1:], float("inf")]  # drop names that would overlap with the next one
    shown = [
        stage[:LONGEST] if after - middle > distance * len(names) else ""
        for (_, stage), middle, after in zip(begins, middles, following, strict=True)
    ]
    getattr(axes, f"set_{which}ticks")(middles, shown, rotation=90 if which == "x" else 0)
