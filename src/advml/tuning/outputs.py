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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from ruamel.yaml import YAML

from advml.paths import SEARCH_FILES
from advml.tracking import Trial
from advml.tuning.search import Search
from advml.tuning.trial_state import ORIGIN, REASON, RETRY_OF, SECONDS, default_of, finished, history_of, name_of, ranked, scores

BEST, TRIALS = SEARCH_FILES
HEADER = """\
# Found by `advml tune`; put into params.yaml by: advml tune apply {name}
# `parameters` are keys of params.yaml, the rest says how they did.
"""


def write(folder: Path, search: Search, trials: Sequence[FrozenTrial], confirmed: dict[str, Any] | None) -> list[Path]:
    """Write everything that the trials of a study, all of them, can tell by now; returns the files."""
    from advml.runtime.checkpoint import write_atomically  # imports torch, as the processes that write have

    texts = {TRIALS: table(trials, search.metrics)}
    if best := best_of(trials, search.definition().directions):
        texts[BEST] = HEADER.format(name=search.name) + proposal(search, trials, best, confirmed)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [*(folder / name for name in texts), *draw(folder, trials, search)]


def best_of(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> FrozenTrial | None:
    """The best feasible trial, by the first objective."""
    return next(iter(ranked(trials, directions)), None)


def fruitless(trials: Sequence[FrozenTrial]) -> str | None:
    """Why there is nothing to propose: no trial has run to its end; None: some have."""
    ended = finished(trials)
    failed = [trial for trial in ended if name_of(trial) == "failed"]
    if any(name_of(trial) == "complete" for trial in ended):
        return None
    if not failed:
        return f"none of {len(ended)} trials has run to its end"
    others = "" if len(failed) == len(ended) else ", others were pruned"
    count = f"all {len(ended)}" if not others else f"{len(failed)} of {len(ended)}"
    return f"{count} trials failed{others}, the last one: {failed[-1].user_attrs[REASON]}"


def proposal(search: Search, trials: Sequence[FrozenTrial], best: FrozenTrial, confirmed: dict[str, Any] | None) -> str:
    """best.yaml without its header."""
    default = default_of(trials)
    content = {
        "study": search.name,
        **({"front": front(search, trials)} if len(search.metrics) > 1 else {}),
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


def front(search: Search, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """The complete trials that no other one beats in one objective without being beaten in another, the best in the first one first."""
    directions = search.definition().directions
    signs = [1 if direction == "minimize" else -1 for direction in directions]
    costs = {trial.number: [sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in ranked(trials, directions)}
    return [
        {"trial": number, "parameters": search.proposal(trials[number].params), "scored": scores(search.metrics, trials[number])}
        for number, cost in costs.items()
        if not any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs.values())
    ]


def fact(search: Search, trial: FrozenTrial) -> Trial | None:
    """A trial as MLflow shows it; None: there is nothing to show yet."""
    if trial.state == optuna.trial.TrialState.WAITING or ORIGIN not in trial.user_attrs:
        return None
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
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    measured = [key for key in dict.fromkeys(key for trial in trials for key in scores(metrics, trial)) if key not in metrics]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", "state", *metrics, *measured, "feasible", "seconds", *keys, "retry_of", "reason"])
    for trial in trials:
        noted, scored = trial.user_attrs, scores(metrics, trial)
        writer.writerow(
            [trial.number, name_of(trial), *(scored.get(key) for key in (*metrics, *measured))]
            + [all(violation <= 0 for violation in trial.constraints.values()) if scored else None, noted.get(SECONDS)]
            + [trial.params.get(key) for key in keys]
            + [noted.get(RETRY_OF), noted.get(REASON)]
        )
    return stream.getvalue()


def draw(folder: Path, trials: Sequence[FrozenTrial], search: Search) -> list[Path]:
    """The figures that there are enough trials for."""
    os.environ.setdefault("MPLBACKEND", "agg")  # no window
    from optuna.visualization import matplotlib as plots

    from advml.figures.searches import legible
    from advml.figures.style import to_png

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    study = optuna.create_study(directions=search.definition().directions)
    study.add_trials(trials)
    metrics, keys = search.metrics, len(search.definition().distributions)
    first = {"target": lambda trial: trial.values[0], "target_name": metrics[0]}
    drawings: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, **first),
        "importance": lambda: plots.plot_param_importances(study, **first),
        "parallel": lambda: plots.plot_parallel_coordinate(study, **first),
        "slice": lambda: plots.plot_slice(study, **first),
    }
    if len(metrics) > 1:
        drawings["pareto"] = lambda: plots.plot_pareto_front(study, target_names=list(metrics))
    written = []
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    for name, drawing in drawings.items() if len({tuple(trial.values) for trial in complete}) > 1 else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Optuna: that it may change its figures; of matplotlib: that it cannot lay them out
            figure = legible(_figure(drawing()), keys=keys, title=f"{search.name}, {len(complete)} complete trials")
            (folder / f"{name}.png").write_bytes(to_png(figure, dpi=120, whole=True))
        written.append(folder / f"{name}.png")
    return written


def _figure(axes: Any) -> Any:
    """The figure of one or of many axes."""
    return axes.figure if hasattr(axes, "figure") else axes.flat[0].figure
