"""Write the results of a search into `reports/tune/<name>/`: proposal, trials and figures.

best.yaml        the best trial as keys of params.yaml, with its scores and those of the default
trials.csv       a row per trial
*.png            history, importance, parallel coordinates, slices, and the Pareto front
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from advml.core.io import to_csv, to_yaml, write_atomically
from advml.core.paths import SEARCH_FILES
from advml.tracking import Trial
from advml.tuning.search import Search
from advml.tuning.study import REASON, RETRY_OF, SECONDS, best_of, default_of, finished, history_of, is_feasible, name_of, ranked, scores

BEST, TRIALS = SEARCH_FILES
HEADER = """\
# Result of `advml tune`; apply it to params.yaml with: advml tune apply {name}
# `parameters` are keys of params.yaml; the other entries are their scores.
"""


def write(folder: Path, search: Search, trials: Sequence[FrozenTrial], confirmed: dict[str, Any] | None) -> list[Path]:
    """Write all files that can be made from the trials so far; returns the files."""
    from advml.figures.searches import draw

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    study = optuna.create_study(study_name=search.name, directions=search.directions)
    study.add_trials(trials)
    texts = {TRIALS: table(trials, search.metrics)}
    if best := best_of(trials, search.directions):
        texts[BEST] = HEADER.format(name=search.name) + proposal(search, study, best, confirmed)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [*(folder / name for name in texts), *draw(study, folder, metrics=search.metrics)]


def proposal(search: Search, study: optuna.Study, best: FrozenTrial, confirmed: dict[str, Any] | None) -> str:
    """Content of best.yaml, without its header."""
    trials = study.get_trials(deepcopy=False)
    default, front = default_of(trials), ranked(study.best_trials, search.directions)

    def about(trial: FrozenTrial) -> dict[str, Any]:
        return {"parameters": search.proposal(trial.params), "trial": trial.number, "scored": scores(search.metrics, trial)}

    content = {
        "study": search.name,
        **({"front": [about(trial) for trial in front]} if len(search.metrics) > 1 else {}),
        **about(best),
        "values": dict(best.params),
        "default_scored": scores(search.metrics, default) if default else None,
        "trials": {
            "finished": len(finished(trials)),
            **{state: sum(name_of(trial) == state for trial in trials) for state in ("complete", "pruned", "failed", "killed")},
        },
        **(confirmed or {}),
    }
    return to_yaml(content, flow=False)


def fact(search: Search, trial: FrozenTrial) -> Trial:
    """Description of a trial for MLflow."""
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
    columns, rows = dict.fromkeys(("trial", "state", *scored, "feasible", SECONDS, *values, RETRY_OF, REASON)), []
    for trial in trials:
        kept = is_feasible(trial) if trial.state == TrialState.COMPLETE else None
        noted = {name: trial.user_attrs.get(name) for name in (SECONDS, RETRY_OF, REASON)}
        figures = {"trial": trial.number, "state": name_of(trial), **scores(metrics, trial), "feasible": kept}
        rows.append(columns | figures | trial.params | noted)
    return to_csv(rows).decode()
