"""Chart of the study's results: clean, attacked and worst-case accuracy of all models.

>>> to_png(accuracy_chart(rows))       # bytes of a PNG, 1600 pixels wide
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from advml.figures.style import ADVERSARIAL, ATTACKED, CLEAN, FULL, INK, MEANING, mark, styled
from advml.recipes import REGIMES, SCHEMES

Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """One bar of a model: metric, name, and colours of the bar and of the value written on it."""

    metric: str
    label: str
    colour: str
    on_top: str


WORST = "accuracy/worst_case"
MEASURES = (
    Measure("accuracy/clean", "clean images", CLEAN, INK),
    Measure("accuracy/threat_model_2", "threat model II", ATTACKED, INK),
    Measure(WORST, "worst case over all attacks", FULL, "white"),
)
BAR = 0.29
SMALL = 12  # %; shorter bars have no room for their value


@styled
def accuracy_chart(rows: list[Row], *, threat_model: str = "") -> Figure:
    """Draw the accuracy of every model, clean, under threat model II and in the worst case: a panel per scheme, a group per regime.

    One seed: bars with 95 % intervals. Several: bars are means, points are seeds. The worst case has the `mark` of its models.

    Args:
        rows: one per model, with `scheme`, `regime`, `seed` and flat metrics (`accuracy/clean`, `accuracy/clean/low`, ...).
            Metrics and models that are missing are left out.
        threat_model: epsilon and norm, for the legend, e.g. "8/255 (L-infinity)".
    """
    schemes, regimes = (_in_order(table, [row[key] for row in rows]) for table, key in ((SCHEMES, "scheme"), (REGIMES, "regime")))
    figure = Figure(figsize=(max(5.6, 0.8 + 2.4 * len(schemes)), 3.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(schemes)), sharey=True, squeeze=False)[0]
    for axes, scheme in zip(panels, schemes, strict=False):
        models = {regime: [row for row in rows if (row["scheme"], row["regime"]) == (scheme, regime)] for regime in regimes}
        models = {regime: found for regime, found in models.items() if found}
        _style_axes(axes, f"{scheme}: {SCHEMES[scheme].title}" if scheme in SCHEMES else scheme, list(models))
        for group, found in enumerate(models.values()):
            for place, measure in enumerate(MEASURES):
                top = _bar(axes, group + (place - 1) * BAR, found, measure)
            _draw_mark(axes, group + (len(MEASURES) - 2) * BAR, top, _worst_mark(found))
    spread = "mean and seeds" if len({row["seed"] for row in rows}) > 1 else "95 % intervals"
    panels[0].set_ylabel(f"test accuracy in %, {spread}")
    handles = [Patch(color=measure.colour, label=measure.label) for measure in MEASURES]
    title = rf"attacked at $\epsilon$ = {threat_model}" if threat_model else None
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), title=title)
    seen = {mark(row) for row in rows}
    if told := "      ".join(f"{sign}  {meaning}" for sign, meaning in MEANING.items() if sign in seen):
        figure.supxlabel(told, fontsize=8, color=ADVERSARIAL)
    return figure


def _worst_mark(models: list[Row]) -> str:
    """Most serious mark of a group of models."""
    found = {mark(row) for row in models}
    return next((sign for sign in MEANING if sign in found), "")


def _draw_mark(axes: Axes, x: float, top: float | None, sign: str) -> None:
    """Draw a mark above a bar and its interval."""
    if sign and top is not None:
        style = {"ha": "center", "fontsize": 10, "fontweight": "bold", "color": ADVERSARIAL}
        axes.annotate(sign, (x, top), (0, 10 if top < SMALL else 2), textcoords="offset points", annotation_clip=False, **style)


def _in_order(table: Iterable[str], names: list[str]) -> list[str]:
    """Distinct names in the order of the table, followed by names that it lacks."""
    return [name for name in dict.fromkeys((*table, *names)) if name in names]


def _style_axes(axes: Axes, title: str, regimes: list[str]) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("training regime")
    axes.set_xticks(range(len(regimes)), regimes)
    axes.tick_params(axis="both", length=0)
    axes.set_xlim(-0.5, max(1, len(regimes)) - 0.5)
    axes.set_ylim(0, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def _bar(axes: Axes, x: float, models: list[Row], measure: Measure) -> float | None:
    """Draw one bar with its value; a 95 % interval for one model, points for several. Returns its upper end; None: there is no value."""
    models = [row for row in models if math.isfinite(row.get(measure.metric, math.nan))]
    values = [100 * row[measure.metric] for row in models]
    if not values:
        return None
    mean = top = sum(values) / len(values)
    axes.bar(x, mean, BAR * 0.94, color=measure.colour)
    if len(values) > 1:
        places = [x + BAR * 0.5 * (number / (len(values) - 1) - 0.5) for number in range(len(values))]
        axes.plot(places, values, "o", markersize=2.8, color=INK, markeredgecolor="white", markeredgewidth=0.4, clip_on=False)
        top = max(values)
    elif f"{measure.metric}/low" in models[0]:
        low, high = (100 * models[0][f"{measure.metric}/{end}"] for end in ("low", "high"))
        arms = [[max(0, mean - low)], [max(0, high - mean)]]  # max: at 0 and 100 %, rounding may put an end inside of the bar
        axes.errorbar(x, mean, arms, color=INK, linewidth=0.9, capsize=1.6, capthick=0.9)
        top = high
    place, colour = (0, measure.on_top) if min(values) > SMALL else (top, INK)
    text = f"{mean:.0f}"
    size = 7.2 if len(text) < 3 else 6  # to fit the width of the bar
    axes.annotate(text, (x, place), (0, 3), textcoords="offset points", ha="center", fontsize=size, color=colour)
    return top
