"""Figures of accuracy against epsilon, and of accuracy under common corruptions, for all models of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from advml.figures.style import INK, QUIET, regime_colours, styled
from advml.figures.transfer import COLOURS, ink

Point = Mapping[str, float]


@styled
def security_curves(
    models: Mapping[str, Mapping[str, Sequence[Point]]],
    *,
    epsilon: float,
    chance: float,
    nearest: Mapping[str, Mapping[str, Sequence[Point]]] | None = None,
    attack: str = "",
) -> Figure:
    """Draw accuracy against the attack's epsilon, with a panel per scheme and a line per regime.

    Args:
        models: scheme -> regime -> points with `epsilon`, `accuracy`, `low`, `high`.
        epsilon: of the study, marked by a line.
        chance: accuracy of guessing, to which the curve of an unmasked model falls.
        nearest: like `models`, from minimal distances, without intervals; drawn as crosses.
        attack: the attack that found the minimal distances.
    """
    figure = Figure(figsize=(max(5.6, 0.8 + 2.6 * len(models)), 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(models)), sharey=True, squeeze=False)[0]
    colours = regime_colours(regime for regimes in (*models.values(), *(nearest or {}).values()) for regime in regimes)
    for axes, (scheme, regimes) in zip(panels, models.items(), strict=True):
        for regime, points in regimes.items():
            at = np.array([point["epsilon"] for point in points])
            place = np.sqrt(at / epsilon)  # a scale with epsilon at 1 that shows both small epsilons and the whole box
            low, middle, high = (100 * np.array([point[key] for point in points]) for key in ("low", "accuracy", "high"))
            axes.fill_between(place, low, high, color=colours[regime], alpha=0.15, linewidth=0)
            axes.plot(place, middle, marker="o", markersize=3, color=colours[regime], label=regime)
        for regime, points in (nearest or {}).get(scheme, {}).items():
            place, shares = (np.array([point[key] for point in points]) for key in ("epsilon", "accuracy"))
            style = {"markersize": 4, "linewidth": 0.8, "color": colours[regime]}
            axes.plot(np.sqrt(place / epsilon), 100 * shares, "x-.", label=f"_{regime}", **style)
        ticks = sorted({point["epsilon"] for points in regimes.values() for point in points})
        axes.set_xticks(np.sqrt(np.array(ticks) / epsilon), [f"{tick:.2g}" for tick in ticks], rotation=60, fontsize=7)
        axes.axvline(1, color=QUIET, linewidth=0.9, linestyle=":")
        axes.axhline(100 * chance, color=QUIET, linewidth=0.9, linestyle="--")
        axes.set_title(scheme, loc="left")
        axes.set_ylim(0, 103)
        axes.grid(axis="y")
        axes.set_xlabel(r"$\epsilon$")
    panels[0].set_ylabel("test accuracy in %, 95 % intervals")
    lines = {line.get_label(): line for axes in panels for line in axes.lines if not line.get_label().startswith("_")}
    if nearest:
        lines[f"by {attack}"] = Line2D([], [], color=INK, marker="x", markersize=4, linewidth=0.8, linestyle="-.")
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=max(1, len(lines)))
    return figure


@styled
def corruption_matrix(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy in % of every model (row) under every corruption (column), with the mean in the last column.

    Args:
        rows: one per model, with `model` and metrics `corruption/<name>`, `corruption/mean`.
    """
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("corruption/") and key.count("/") == 1]
    names.sort(key=lambda key: key == "corruption/mean")
    shares = np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=float)
    figure = Figure(figsize=(0.5 * len(names) + 2.2, 0.34 * len(rows) + 1.9), layout="constrained")
    axes, colours = figure.subplots(), matplotlib.colormaps[COLOURS]
    axes.imshow(shares, vmin=0, vmax=1, cmap=colours, aspect="auto")
    for (line, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            axes.text(column, line, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink(colours, share))
    labels = [name.removeprefix("corruption/").replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.set(xlabel="corruption", ylabel="model")
    axes.axvline(len(names) - 1.5, color="white", linewidth=4)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    return figure
