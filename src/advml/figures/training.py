"""Training curves: pretraining and fine-tuning of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from advml.figures.style import ADVERSARIAL, FULL, QUIET, styled

Record = dict[str, float]

CURVES = {"train": "-", "validation": "--"}


@styled
def training_curves(phases: Mapping[str, tuple[Sequence[Record], int | None]]) -> Figure:
    """Draw loss, accuracy (if it is the validation score) and learning rate over the epochs of a model's phases, side by side.

    Args:
        phases: name of a phase -> its epoch records, as in `history.json` (`epoch`, `learning_rate`, `train/loss`,
            `validation/accuracy` or `validation/loss`, `train/adversarial_loss`, ...), and the epoch whose weights were kept.
    """
    figure = Figure(figsize=(7.4 * len(phases), 3), layout="constrained")
    shown: dict[str, Any] = {}
    for part, (title, (history, selected)) in zip(figure.subfigures(1, len(phases), squeeze=False)[0], phases.items(), strict=True):
        kept = "" if selected is None else f"   (dotted: epoch {selected} was kept)"
        part.suptitle(title + kept, x=0.01, ha="left", fontweight="bold", fontsize=10)
        panels = _phase(part, history, selected)
        shown |= {line.get_label(): line for axes in panels for line in axes.lines if not line.get_label().startswith("_")}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def _phase(figure: SubFigure, history: Sequence[Record], selected: int | None) -> list[Axes]:
    """Draw one phase; returns its panels, except that of the learning rate."""
    names = {name for record in history for name in record}
    quantities = [quantity for quantity in ("loss", "accuracy") if any(name.endswith(quantity) for name in names)]
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
    return panels


def _curves(axes: Axes, history: Sequence[Record], quantity: str) -> None:
    for split, style in CURVES.items():
        _line(axes, history, f"{split}/{quantity}", color=FULL, linestyle=style, label=f"{split}, clean")
        _line(axes, history, f"{split}/adversarial_{quantity}", color=ADVERSARIAL, linestyle=style, label=f"{split}, adversarial")
    axes.set_title(quantity, loc="left")
    if quantity == "accuracy":
        axes.set_ylim(0, 1.02)


def _line(axes: Axes, history: Sequence[Record], name: str, **style: Any) -> None:
    """Draw one metric over the epochs that have it; a point if there is only one."""
    points = [(record["epoch"], record[name]) for record in history if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else "", markersize=4, **style)
