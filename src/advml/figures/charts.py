"""Charts of the study: the accuracy of all models, the curves of one training phase.

>>> to_png(accuracy_chart(rows))       # bytes of a PNG, 1600 pixels wide
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from advml.figures.style import ADVERSARIAL, CLEAN, FULL, HALF, INK, QUIET, styled, to_png

__all__ = ["accuracy_chart", "to_png", "training_curves"]

Row = dict[str, Any]
Record = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """One bar of a model: its metric, its name, and the colours of the bar and of the value written on it."""

    metric: str
    label: str
    colour: str
    on_top: str


MEASURES = (
    Measure("accuracy/clean", "clean images", CLEAN, INK),
    Measure("accuracy/threat_model_2_half", r"attacked, half $\epsilon$", HALF, INK),
    Measure("accuracy/threat_model_2", r"attacked, $\epsilon$", FULL, "white"),
)
ORDER = ("SL", "CL", "SCL", "ST", "AT", "Partial-AT", "Full-AT")
TITLES = {"SL": "SL: supervised", "CL": "CL: contrastive", "SCL": "SCL: supervised contrastive"}
BAR = 0.29


@styled
def accuracy_chart(rows: list[Row], *, threat_model: str = "") -> Figure:
    """Accuracy of every model, clean and under attack (threat model II): a panel per scheme, a group per regime.

    One seed: bars with 95 % intervals. Several: bars are means, points are the seeds.

    Args:
        rows: one per model, with `scheme`, `regime`, `seed` and flat metrics (`accuracy/clean`, `accuracy/clean/low`, ...).
            Metrics and models that are missing are left out.
        threat_model: what epsilon is, for the legend, e.g. "8/255 (L-infinity)".
    """
    schemes, regimes = (_in_order([row[key] for row in rows]) for key in ("scheme", "regime"))
    figure = Figure(figsize=(max(5.6, 0.8 + 2.4 * len(schemes)), 3.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(schemes)), sharey=True, squeeze=False)[0]
    for axes, scheme in zip(panels, schemes, strict=False):
        models = {regime: [row for row in rows if (row["scheme"], row["regime"]) == (scheme, regime)] for regime in regimes}
        models = {regime: found for regime, found in models.items() if found}
        _dress(axes, TITLES.get(scheme, scheme), list(models))
        for group, found in enumerate(models.values()):
            for place, measure in enumerate(MEASURES):
                _bar(axes, group + (place - 1) * BAR, found, measure)
    spread = "mean and seeds" if len({row["seed"] for row in rows}) > 1 else "95 % intervals"
    panels[0].set_ylabel(f"test accuracy in %, {spread}")
    labels = [measure.label for measure in MEASURES]
    labels[-1] += f" = {threat_model}" if threat_model else ""
    handles = [Patch(color=measure.colour, label=label) for measure, label in zip(MEASURES, labels, strict=True)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _in_order(names: list[str]) -> list[str]:
    """Distinct names, the study's own first and in its order."""
    distinct = dict.fromkeys(names)
    return [name for name in ORDER if name in distinct] + [name for name in distinct if name not in ORDER]


def _dress(axes: Axes, title: str, regimes: list[str]) -> None:
    axes.set_title(title, loc="left")
    axes.set_xticks(range(len(regimes)), [regime.replace("-", "-\n") for regime in regimes])
    axes.tick_params(axis="both", length=0)
    axes.set_xlim(-0.5, max(1, len(regimes)) - 0.5)
    axes.set_ylim(0, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def _bar(axes: Axes, x: float, models: list[Row], measure: Measure) -> None:
    """One bar, its value written at its foot; a 95 % interval for one model, points for several."""
    models = [row for row in models if math.isfinite(row.get(measure.metric, math.nan))]
    values = [100 * row[measure.metric] for row in models]
    if not values:
        return
    mean = top = sum(values) / len(values)
    axes.bar(x, mean, BAR * 0.94, color=measure.colour)
    if len(values) > 1:
        places = [x + BAR * 0.5 * (number / (len(values) - 1) - 0.5) for number in range(len(values))]
        axes.plot(places, values, "o", markersize=2.8, color=INK, markeredgecolor="white", markeredgewidth=0.4, clip_on=False)
        top = max(values)
    elif f"{measure.metric}/low" in models[0]:
        low, high = (100 * models[0][f"{measure.metric}/{end}"] for end in ("low", "high"))
        arms = [[max(0, mean - low)], [max(0, high - mean)]]  # at 0 and 100 % rounding may put an end inside of the bar
        axes.errorbar(x, mean, arms, color=INK, linewidth=0.9, capsize=1.6, capthick=0.9)
        top = high
    place, colour = (0, measure.on_top) if min(values) > 12 else (top, INK)
    text = f"{mean:.0f}"
    size = 7.2 if len(text) < 3 else 6  # the bar is that narrow
    axes.annotate(text, (x, place), (0, 3), textcoords="offset points", ha="center", fontsize=size, color=colour)


CURVES = {"train": "-", "validation": "--"}


@styled
def training_curves(history: list[Record], title: str, *, selected: int | None = None) -> Figure:
    """Loss, accuracy (where it is the validation score) and learning rate over the epochs of one training phase.

    Args:
        history: epoch records as in `history.json`: `epoch`, `learning_rate`, `train/loss`, `validation/accuracy` or
            `validation/loss`, and the same of adversarial images (`train/adversarial_loss`, ...).
        title: e.g. the model's name.
        selected: the epoch whose weights were kept; marked by a line.
    """
    names = {name for record in history for name in record}
    quantities = [quantity for quantity in ("loss", "accuracy") if any(name.endswith(quantity) for name in names)]
    figure = Figure(figsize=(8, 3), layout="constrained")
    kept = "" if selected is None else f"   (dotted: epoch {selected} was kept)"
    figure.suptitle(title + kept, x=0.01, ha="left", fontweight="bold", fontsize=10)
    *panels, rate = figure.subplots(1, len(quantities) + 1, width_ratios=[3] * len(quantities) + [1.8], squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        _curves(axes, history, quantity)
    _line(rate, history, "learning_rate", color=QUIET)
    rate.set_title("learning rate", loc="left")
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    for axes in (*panels, rate):
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlim(0, 1.05 * max((record["epoch"] for record in history), default=1))
        axes.set_xlabel("epoch")
        if selected is not None:
            axes.axvline(selected, color=QUIET, linewidth=0.9, linestyle=":")
    shown = {line.get_label(): line for axes in panels for line in axes.lines if not line.get_label().startswith("_")}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def _curves(axes: Axes, history: list[Record], quantity: str) -> None:
    for split, style in CURVES.items():
        _line(axes, history, f"{split}/{quantity}", color=FULL, linestyle=style, label=f"{split}, clean")
        _line(axes, history, f"{split}/adversarial_{quantity}", color=ADVERSARIAL, linestyle=style, label=f"{split}, adversarial")
    axes.set_title(quantity, loc="left")
    if quantity == "accuracy":
        axes.set_ylim(0, 1.02)


def _line(axes: Axes, history: list[Record], name: str, **style: Any) -> None:
    """The curve of one metric, over the epochs that have it; a point if there is only one."""
    points = [(record["epoch"], record[name]) for record in history if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else "", markersize=4, **style)
