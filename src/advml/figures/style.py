"""Style of all figures: matplotlib settings, colours, marks and PNG output, without pyplot (no global state, no window).

The colours are those of Okabe and Ito (2008), which also differ in lightness: they can be told apart with any colour vision and in
print. The background is white, also on a dark page.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from advml.recipes import REGIMES

# Marks beside accuracies that may be too high, the same in tables and charts.

FLAGGED, UNJUDGED = "!", "?"
MEANING = {FLAGGED: "diagnostics raised flags", UNJUDGED: "not judged by diagnostics"}


def mark(row: Mapping[str, Any]) -> str:
    """Mark of a model: `!` if it has flags, `?` if it was attacked and diagnostics were not run, else nothing.

    Args:
        row: the model's flat metrics.
    """
    if row.get("diagnostics/flags") or row.get("transfer/flags"):
        return FLAGGED
    return UNJUDGED if "accuracy/worst_case" in row and "diagnostics/flags" not in row else ""


P = ParamSpec("P")

NORM_NAMES = {"linf": "L-infinity", "l2": "L2"}

INK, QUIET, GRID = "#222222", "#6b6b6b", "#e3e3e3"
CLEAN, ATTACKED, FULL, ADVERSARIAL = "#c3cdd6", "#56b4e9", "#0072b2", "#d55e00"
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


# Colours of the regimes' lines, in the order of REGIMES.
PALETTE = (QUIET, "#e69f00", ATTACKED, FULL, "#cc79a7", "#009e73", ADVERSARIAL, "#f0e442")


def regime_colours(names: Iterable[str]) -> dict[str, str]:
    """Colour of every regime; a row of REGIMES keeps its colour, whichever other regimes are drawn."""
    return dict(zip(dict.fromkeys((*REGIMES, *names)), itertools.cycle(PALETTE), strict=False))


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: draw in STYLE, and restore matplotlib's settings afterwards."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def to_png(figure: Figure, *, dpi: float | None = None, whole: bool = False) -> bytes:
    """Bytes of the figure as a PNG file; the same figure gives the same bytes.

    Args:
        whole: enlarge the picture until labels that reach over its edge are inside.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(dpi or STYLE["savefig.dpi"])
        if whole:
            figure.savefig(stream, format="png", bbox_inches="tight", metadata={"Software": None})
            return stream.getvalue()
        canvas.print_png(stream, metadata={"Software": None})  # the bytes that `savefig` writes, which draws twice for the layout
    return stream.getvalue()
