"""Figure of the effects behind the claims, with intervals and the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from advml.figures.style import ADVERSARIAL, FULL, INK, QUIET, styled

# First word of a verdict -> colour; a verdict may continue with "for this seed".
COLOURS = {"supported": "#009e73", "contradicted": ADVERSARIAL, "inconclusive": QUIET, "not tested": "#c8c8c8"}
LINE = 0.27  # inches per part
EDGE = 0.01  # left margin of the titles, as a share of the figure's width


@styled
def effects(claims: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw one panel per claim with tested parts, one line per part: effect, 95 % interval, bound, the paper's figure.

    The colour is the part's verdict; parts of a claim that is not tested as a whole are light grey.

    Args:
        claims: of claims.json; parts that were not tested are left out.
    """
    tested = [(claim, [part for part in claim["parts"] if "effect" in part]) for claim in claims]
    tested = [(claim, parts) for claim, parts in tested if parts]
    heights = [len(parts) + 1.6 for _, parts in tested]
    figure = Figure(figsize=(8.4, LINE * sum(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(tested), 1, squeeze=False, height_ratios=heights)[:, 0] if tested else []
    for axes, (claim, parts) in zip(panels, tested, strict=True):
        _panel(axes, claim, parts)
        axes.set_xlabel("effect" if axes is panels[-1] else "")
    words = dict.fromkeys(_label(claim, part) for claim, parts in tested for part in parts)
    marks = [
        *(Line2D([], [], color=_colour(word), marker="o", markersize=5, label=word) for word in words),
        Line2D([], [], color=FULL, marker="D", markersize=4.5, linestyle="", markerfacecolor="white", label="the paper"),
        Line2D([], [], color=INK, linewidth=0.9, linestyle=":", label="claimed bound"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8)
    _align_titles(figure)
    return figure


def _label(claim: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """Label of a part: `supported (3 seeds)`, or that its claim is not tested."""
    if claim["verdict"] == "not tested":
        return "not tested as a whole"
    return f"{part['verdict']} ({part['seeds']} seed{'s' if part['seeds'] > 1 else ''})"


def _colour(verdict: str) -> str:
    return next(colour for word, colour in COLOURS.items() if verdict.startswith(word))


def _align_titles(figure: Figure) -> None:
    """Put the titles at the figure's left edge, because sentences are longer than their panels."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    for axes in figure.axes:
        place = axes.get_position()
        axes.set_title(axes.get_title(loc="left"), loc="left", x=(EDGE - place.x0) / place.width, fontsize=8.5)


def _panel(axes: Axes, claim: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(claim["claim"], loc="left", fontsize=8.5)
    for place, part in enumerate(reversed(parts)):
        colour = _colour(_label(claim, part))
        axes.plot([part["bound"], part["bound"]], [place - 0.42, place + 0.42], color=INK, linewidth=0.9, linestyle=":")
        if part["low"] is not None and part["high"] is not None:
            axes.plot([part["low"], part["high"]], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        if part["effect"] is not None:
            axes.plot(part["effect"], place, "o", color=colour, markersize=5)
        if part["paper"] is not None:
            axes.plot(part["paper"], place, "D", color=FULL, markerfacecolor="white", markersize=4.5)
    axes.set_yticks(range(len(parts)), [part["name"] for part in reversed(parts)], fontsize=7.5)
    axes.set_ylim(-0.6, len(parts) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
