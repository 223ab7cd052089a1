"""Optuna's figures of a search, with room for what stands on them."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

PANEL, KEY, LEAST, HEIGHT = 2.6, 1.3, 8.0, 5.0  # inches


def legible(figure: Figure, *, keys: int, title: str) -> Figure:
    """The same figure wide enough for its keys: Optuna makes all of one size, however many there are and however long their names.

    Args:
        keys: how many the search has.
        title: in place of Optuna's own.
    """
    panels = len({round(axes.get_position().x0, 3) for axes in figure.axes}) - 1  # the last one is a colour bar
    figure.set_size_inches(max(LEAST, PANEL * panels if panels > 2 else KEY * keys), HEIGHT)
    for axes in figure.axes:
        axes.xaxis.set_minor_formatter(NullFormatter())  # of logarithmic axes, whose labels would lie on one another
        axes.tick_params(axis="x", labelrotation=60 if keys > 3 else 0)
        axes.set_title("")
    figure.suptitle(title, fontsize=11)
    return figure
