"""Optuna's figures of a search, enlarged so that their labels fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.study import Study
from optuna.trial import TrialState
from optuna.visualization import matplotlib as plots

from advml.figures.style import to_png

PANEL, KEY, LEAST, HEIGHT = 2.6, 1.3, 8.0, 5.0  # inches


def draw(study: Study, folder: Path, *, metrics: Sequence[str]) -> list[Path]:
    """Write the figures for which there are enough trials, e.g. `slice.png`; returns the files.

    Args:
        metrics: names of the objectives; with two or more, the Pareto front is drawn, too.
    """
    complete, written = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]), []
    if len({tuple(trial.values) for trial in complete}) < 2:
        return written
    matplotlib.use("agg")  # Optuna uses pyplot, which would open windows
    first = {"target": lambda trial: trial.values[0], "target_name": metrics[0]}
    drawings = {
        "history": (plots.plot_optimization_history, first),
        "importance": (plots.plot_param_importances, first),
        "parallel": (plots.plot_parallel_coordinate, first),
        "slice": (plots.plot_slice, first),
    }
    if len(metrics) > 1:
        drawings["pareto"] = plots.plot_pareto_front, {"target_names": list(metrics)}
    keys, title = len({key for trial in complete for key in trial.params}), f"{study.study_name}, {len(complete)} complete trials"
    for name, (plot, options) in drawings.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna: experimental figures; matplotlib: layouts that fail
            figure = legible(np.ravel(plot(study, **options))[0].figure, keys=keys, title=title)  # `plot` may return several axes
            written.append(folder / f"{name}.png")
            written[-1].write_bytes(to_png(figure, dpi=120, whole=True))
    return written


def legible(figure: Figure, *, keys: int, title: str) -> Figure:
    """Widen a figure for its number of keys and the length of their names; Optuna's figures all have one size.

    Args:
        keys: number of keys of the search.
        title: replaces Optuna's title.
    """
    panels = len({round(axes.get_position().x0, 3) for axes in figure.axes}) - 1  # the last one is a colour bar
    figure.set_size_inches(max(LEAST, PANEL * panels if panels > 2 else KEY * keys), HEIGHT)
    for axes in figure.axes:
        axes.xaxis.set_minor_formatter(NullFormatter())  # minor labels of logarithmic axes would overlap
        axes.tick_params(axis="x", labelrotation=60 if keys > 3 else 0)
        axes.set_title("")
    figure.suptitle(title, fontsize=11)
    return figure
