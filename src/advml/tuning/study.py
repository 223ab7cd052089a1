"""Optuna's study behind a search: creation, choice and storage of trials, recovery after kills, and the ranking of trials.

| state              | meaning                                                                               |
|--------------------|---------------------------------------------------------------------------------------|
| WAITING            | to be run: the default's parameters, or those of a trial whose process was killed     |
| RUNNING            | a process works on it                                                                 |
| COMPLETE, PRUNED   | finished                                                                              |
| FAIL with a reason | finished: its parameters do not work (NaN, out of memory)                             |
| FAIL without one   | its process was killed; another trial has its parameters and, on disk, its last epoch |

Only the driver that holds its lock changes a study.
"""

from __future__ import annotations

import itertools
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from advml.core.errors import UserError
from advml.tuning.search import Attempt, Search
from advml.tuning.space import distributions
from advml.tuning.storage import connect

MOST_KILLS = 10  # kills in a row without progress after which a trial fails (probably out of memory)
# Attributes of a study
FINGERPRINT = "fingerprint"  # digest of the search's settings
IDENTITY = "identity"  # unique id, different also from other studies of the same name and fingerprint
# Attributes of a trial
REASON = "reason"  # why its parameters do not work
ORIGIN = "origin"  # number of the first trial of the parameters that it repeats; names the scratch folder
RETRY_OF = "retry_of"  # number of the killed trial whose parameters it repeats
HISTORY = "epoch"  # epoch/0, epoch/1, ...: its records, one per attribute because MySQL limits an attribute to 65,535 bytes
DEFAULT = "default"  # whether it has the default's values
LATEST = "latest"  # latest measurements, for display
MEASURED = "measured"  # figures besides the objectives
SECONDS = "seconds"  # duration


def create(search: Search, url: str, *, replace: bool = False) -> optuna.Study:
    """Create the study of a search, or open that of an earlier command.

    Args:
        replace: whether a study of this name with another fingerprint is deleted; one without results always is.
    Raises:
        UserError: there is a study of this name with results of another fingerprint, or the database cannot be used.
    """
    fingerprint, storage = search.fingerprint(), connect(url)  # a refusal comes before the database is created
    options = {"study_name": search.name, "storage": storage, "pruner": search.pruner(), "directions": list(search.directions)}
    study = optuna.create_study(**options, load_if_exists=True)
    if study.user_attrs.get(FINGERPRINT, fingerprint) != fingerprint:
        trials = study.get_trials(deepcopy=False)
        if not replace and (finished(trials) or any(trial.intermediate_values for trial in trials)):
            raise UserError(
                f"the search {search.name} exists with another space, or other parameters, data or weights; "
                f"choose another name: --name {search.name}-2, or delete that search: --replace"
            )
        optuna.delete_study(study_name=search.name, storage=storage)
        study = optuna.create_study(**options)
    if study.metric_names is None:
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            study.set_metric_names(list(search.metrics))  # for Optuna's dashboard
    if FINGERPRINT not in study.user_attrs:  # new, or its creator was killed before setting it
        if not search.missed() and not study.get_trials(deepcopy=False):
            default = {key: search.default()[key] for key in search.space}
            told = {"distributions": distributions(search.space), "user_attrs": {DEFAULT: True}}
            # Not `enqueue_trial`, in which a kill can leave a trial with some of its parameters missing.
            study.add_trial(create_trial(state=TrialState.WAITING, params=default, **told))
        study.set_user_attr(IDENTITY, uuid.uuid4().hex[:16])
        study.set_user_attr(FINGERPRINT, fingerprint)
    return study


def next_trial(study: optuna.Study, search: Search) -> optuna.Trial:
    """Take a waiting trial, or sample new values, which depend on the search's seed and the number of trials so far."""
    study.sampler = search.sampler(search.spec.seed + len(study.get_trials(deepcopy=False)))
    trial = study.ask(distributions(search.space))
    trial.set_user_attr(ORIGIN, trial.user_attrs.get(ORIGIN, trial.number))
    return trial


def note(trial: optuna.Trial, step: int, value: float, measured: Mapping[str, float] | None) -> bool:
    """Store a report; returns whether to stop the trial. The default is never stopped, since the winner is compared to it."""
    if measured:
        trial.set_user_attr(LATEST, measured)
    trial.report(value, step)
    return not trial.user_attrs.get(DEFAULT, False) and trial.should_prune()


def finish(study: optuna.Study, trial: optuna.Trial, attempt: Attempt) -> None:
    """Store the result of a trial."""
    records = {f"{HISTORY}/{number}": record for number, record in enumerate(attempt.history)}
    for key, value in {MEASURED: attempt.measured, SECONDS: attempt.seconds, **records, REASON: attempt.reason}.items():
        if value:
            trial.set_user_attr(key, value)
    for name, violation in attempt.constraints.items():
        trial.set_constraint(name, violation)
    study.tell(trial, values=attempt.objectives, state=attempt.state)


def requeue_dead(study: optuna.Study, *, alive: set[int] = frozenset()) -> None:
    """Mark running trials without a process as failed, and queue their parameters again; idempotent.

    Args:
        alive: numbers of the trials that have a process.
    """
    for trial in running(study.get_trials(deepcopy=False)):
        if trial.number not in alive:
            study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    for trial in trials:
        if is_killed(trial) and trial.number not in retried:
            study.add_trial(_again(trial, trials))


def _again(killed: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """New waiting trial with the parameters of a killed one; a failed trial, if it was killed too often."""
    origin = killed.user_attrs.get(ORIGIN, killed.number)
    of_these = [trial for trial in trials if trial.user_attrs.get(ORIGIN, trial.number) == origin]
    reached = [-1, *(max(trial.intermediate_values, default=-1) for trial in of_these)]  # the last step reported by each
    kills = len(reached) - 1 - reached.index(max(reached))  # kills since the last progress
    attributes = {RETRY_OF: killed.number, ORIGIN: origin, DEFAULT: killed.user_attrs.get(DEFAULT, False)}
    state = TrialState.WAITING
    if kills > MOST_KILLS:
        state = TrialState.FAIL
        attributes[REASON] = f"killed {kills} times in a row without progress (out of memory?)"
    return create_trial(state=state, params=killed.params, distributions=killed.distributions, user_attrs=attributes)


# Reading Optuna's records of trials


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Finished trials: complete, pruned, or failed for a reason (not killed), in the order in which they ended."""
    counted = [trial for trial in trials if trial.state.is_finished() and not is_killed(trial)]
    return sorted(counted, key=lambda trial: trial.datetime_complete)


def running(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.RUNNING]


def is_killed(trial: FrozenTrial) -> bool:
    """Whether the trial ended because its process was killed."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def name_of(trial: FrozenTrial) -> str:
    """State of a trial in words: running, waiting, complete, pruned, failed or killed."""
    if is_killed(trial):
        return "killed"
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a complete trial fulfils all constraints."""
    return max(trial.constraints.values(), default=0) <= 0


def ranked(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """Complete trials that fulfil all constraints, sorted by their first objective, best first; on a tie the earlier one first."""
    sign = -1 if directions[0] == "maximize" else 1
    feasible = [trial for trial in trials if trial.state == TrialState.COMPLETE and is_feasible(trial)]
    return sorted(feasible, key=lambda trial: (sign * trial.values[0], trial.number))


def best_of(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> FrozenTrial | None:
    """Best trial that fulfils all constraints, by the first objective; None if there is none."""
    return next(iter(ranked(trials, directions)), None)


def default_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Complete trial with the default's values; None if there is none."""
    return next((trial for trial in trials if trial.user_attrs.get(DEFAULT) and trial.state == TrialState.COMPLETE), None)


def scores(metrics: Sequence[str], trial: FrozenTrial) -> dict[str, float]:
    """Objectives and further measurements of a trial."""
    if trial.state != TrialState.COMPLETE:  # Optuna uses the last report as the value of a pruned trial
        return {}
    return dict(zip(metrics, trial.values, strict=True)) | trial.user_attrs.get(MEASURED, {})


def history_of(trial: FrozenTrial) -> list[Mapping[str, Any]]:
    """Records of all epochs or batches of a trial."""
    keys = map(f"{HISTORY}/{{}}".format, itertools.count())
    return [trial.user_attrs[key] for key in itertools.takewhile(trial.user_attrs.__contains__, keys)]
