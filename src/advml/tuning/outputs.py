"""What a study leaves in `reports/tune/<name>/`: the proposal, all trials, and figures.

best.yaml        the best trial as keys of params.yaml, what it scored, and what the default did
trials.csv       a row per trial
*.png            history, importance, parallel coordinates, slices, and the Pareto front
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from ruamel.yaml import YAML

from advml.core.io import write_atomically
from advml.core.paths import SEARCH_FILES
from advml.tracking import Trial
from advml.tuning.search import Search
from advml.tuning.trial_state import REASON, RETRY_OF, SECONDS, best_of, default_of, finished, history_of, name_of, ranked, scores

BEST, TRIALS = SEARCH_FILES
HEADER = """\
# Found by `advml tune`; put into params.yaml by: advml tune apply {name}
# `parameters` are keys of params.yaml, the rest says how they did.
"""


def write(folder: Path, search: Search, trials: Sequence[FrozenTrial], confirmed: dict[str, Any] | None) -> list[Path]:
    """Write everything that the trials of a study, all of them, can tell by now; returns the files."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    study = optuna.create_study(directions=search.directions)
    study.add_trials(trials)
    texts = {TRIALS: table(trials, search.metrics)}
    if best := best_of(trials, search.directions):
        texts[BEST] = HEADER.format(name=search.name) + proposal(search, study, best, confirmed)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [*(folder / name for name in texts), *draw(folder, study, search)]


def proposal(search: Search, study: optuna.Study, best: FrozenTrial, confirmed: dict[str, Any] | None) -> str:
    """best.yaml without its header."""
    trials = study.get_trials(deepcopy=False)
    default, front = default_of(trials), ranked(study.best_trials, search.directions)

    def scored(trial: FrozenTrial) -> dict[str, Any]:
        return {"parameters": search.proposal(trial.params), "scored": scores(search.metrics, trial)}

    content = {
        "study": search.name,
        **({"front": [{"trial": trial.number, **scored(trial)} for trial in front]} if len(search.metrics) > 1 else {}),
        "parameters": search.proposal(best.params),
        "trial": best.number,
        "values": dict(best.params),
        "scored": scores(search.metrics, best),
        "default_scored": scores(search.metrics, default) if default else None,
        "trials": {
            "finished": len(finished(trials)),
            **{state: sum(name_of(trial) == state for trial in trials) for state in ("complete", "pruned", "failed", "killed")},
        },
        **(confirmed or {}),
    }
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = False, False, 120
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def fact(search: Search, trial: FrozenTrial) -> Trial:
    """A trial as MLflow shows it."""
    return Trial(
        number=trial.number,
        state=name_of(trial),
        params=search.proposal(trial.params),
        metrics=scores(search.metrics, trial),
        history=history_of(trial),
        reason=trial.user_attrs.get(REASON),
    )


def table(trials: Sequence[FrozenTrial], metrics: Sequence[str]) -> str:
    """trials.csv."""
    scored = dict.fromkeys((*metrics, *(name for trial in trials for name in scores(metrics, trial))))
    values = dict.fromkeys(key for trial in trials for key in trial.params)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["trial", "state", *scored, "feasible", SECONDS, *values, RETRY_OF, REASON], lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        kept = all(violation <= 0 for violation in trial.constraints.values()) if trial.state == TrialState.COMPLETE else None
        noted = {name: trial.user_attrs.get(name) for name in (SECONDS, RETRY_OF, REASON)}
        figures = {"trial": trial.number, "state": name_of(trial), **scores(metrics, trial), "feasible": kept}
        writer.writerow(figures | trial.params | noted)
    return stream.getvalue()


def draw(folder: Path, study: optuna.Study, search: Search) -> list[Path]:
    """The figures that there are enough trials for."""
    os.environ.setdefault("MPLBACKEND", "agg")  # no window
    from optuna.visualization import matplotlib as plots

    from advml.figures.searches import legible
    from advml.figures.style import to_png

    first = {"target": lambda trial: trial.values[0], "target_name": search.metrics[0]}
    drawings = {
        "history": (plots.plot_optimization_history, first),
        "importance": (plots.plot_param_importances, first),
        "parallel": (plots.plot_parallel_coordinate, first),
        "slice": (plots.plot_slice, first),
    }
    if len(search.metrics) > 1:
        drawings["pareto"] = plots.plot_pareto_front, {"target_names": list(search.metrics)}
    complete, written = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]), []
    for name, (plot, options) in drawings.items() if len({tuple(trial.values) for trial in complete}) > 1 else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Optuna: that it may change its figures; of matplotlib: that it cannot lay them out
            axes = np.ravel(plot(study, **options))[0]  # of one or many
            figure = legible(axes.figure, keys=len(search.space), title=f"{search.name}, {len(complete)} complete trials")
            (folder / f"{name}.png").write_bytes(to_png(figure, dpi=120, whole=True))
        written.append(folder / f"{name}.png")
    return written
