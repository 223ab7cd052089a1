"""One study: created once, handed out trial by trial, and never left with a dead trial; which trials count, and which is best.

| state              | means                                                                                 |
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
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from advml.core.errors import UserError
from advml.tuning.search import Attempt, Search
from advml.tuning.space import distributions
from advml.tuning.storage import connect

MOST_KILLS = 10  # in a row without progress: perhaps for want of memory
# Attributes of a study
FINGERPRINT = "fingerprint"  # of what it searches
IDENTITY = "identity"  # what no other one has, also of the same name and fingerprint
# Attributes of a trial
REASON = "reason"  # why its parameters do not work
ORIGIN = "origin"  # number of the first trial of the parameters that it repeats; names the scratch folder
RETRY_OF = "retry_of"  # number of the killed trial whose parameters it repeats
HISTORY = "epoch"  # epoch/0, epoch/1, ...: what it has recorded, apart because an attribute holds 65,535 bytes in MySQL
DEFAULT = "default"  # whether it has the default's values
LATEST = "latest"  # what it has measured last, for people
MEASURED = "measured"  # figures beside the objectives
SECONDS = "seconds"  # that it took


def create(search: Search, url: str, *, replace: bool = False) -> optuna.Study:
    """Create the study of a search, or open the one that an earlier command has begun.

    Args:
        replace: whether one that searched something else is thrown away.
    Raises:
        UserError: there is a study of this name that searched something else, or the database cannot be used.
    """
    storage, fingerprint = connect(url), search.fingerprint()
    options = {"study_name": search.name, "storage": storage, "pruner": search.pruner(), "directions": list(search.directions)}
    study = optuna.create_study(**options, load_if_exists=True)
    if study.user_attrs.get(FINGERPRINT, fingerprint) != fingerprint:
        if not replace:
            raise UserError(
                f"the study {search.name} searched another space, or under other parameters, data or weights; "
                f"give this one a name of its own: --name {search.name}-2, or throw that one away: --replace"
            )
        optuna.delete_study(study_name=search.name, storage=storage)
        study = optuna.create_study(**options)
    if FINGERPRINT not in study.user_attrs:  # new, or its creator was killed right here
        if not search.missed() and not study.get_trials(deepcopy=False):
            default = {key: search.default()[key] for key in search.space}
            told = {"distributions": distributions(search.space), "user_attrs": {DEFAULT: True}}
            # Not `enqueue_trial`: of its trials a kill can leave half of the parameters.
            study.add_trial(create_trial(state=TrialState.WAITING, params=default, **told))
        study.set_user_attr(IDENTITY, uuid.uuid4().hex[:16])
        study.set_user_attr(FINGERPRINT, fingerprint)
    return study


def next_trial(study: optuna.Study, search: Search) -> optuna.Trial:
    """Take the next trial: one that waits, or new values; these follow from the search's seed and the number of trials so far."""
    study.sampler = search.sampler(search.spec.seed + len(study.get_trials(deepcopy=False)))
    trial = study.ask(distributions(search.space))
    trial.set_user_attr(ORIGIN, trial.user_attrs.get(ORIGIN, trial.number))
    return trial


def note(trial: optuna.Trial, step: int, value: float, measured: Mapping[str, float] | None) -> bool:
    """Keep a report; returns whether the trial is to stop. The default, the one to beat, never is."""
    if measured:
        trial.set_user_attr(LATEST, measured)
    trial.report(value, step)
    return not trial.user_attrs.get(DEFAULT, False) and trial.should_prune()


def finish(study: optuna.Study, trial: optuna.Trial, attempt: Attempt) -> None:
    """Keep how a trial has ended."""
    records = {f"{HISTORY}/{number}": record for number, record in enumerate(attempt.history)}
    for key, value in {MEASURED: attempt.measured, SECONDS: attempt.seconds, **records, REASON: attempt.reason}.items():
        if value:
            trial.set_user_attr(key, value)
    for name, violation in attempt.constraints.items():
        trial.set_constraint(name, violation)
    study.tell(trial, values=attempt.objectives, state=attempt.state)


def requeue_dead(study: optuna.Study, *, alive: set[int] = frozenset()) -> None:
    """End the running trials that nobody works on, and queue their parameters again. Repeating it changes nothing.

    Args:
        alive: numbers of those that are at work.
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
    """The same parameters as a waiting trial; or, for one that is killed whenever it runs, as a failed one."""
    origin = killed.user_attrs.get(ORIGIN, killed.number)
    of_these = [trial for trial in trials if trial.user_attrs.get(ORIGIN, trial.number) == origin]
    reached = [-1, *(max(trial.intermediate_values, default=-1) for trial in of_these)]  # the last step that each has reported
    kills = len(reached) - 1 - reached.index(max(reached))  # since one of them got further than those before it
    attributes = {RETRY_OF: killed.number, ORIGIN: origin, DEFAULT: killed.user_attrs.get(DEFAULT, False)}
    state = TrialState.WAITING
    if kills > MOST_KILLS:
        state = TrialState.FAIL
        attributes[REASON] = f"killed {kills} times in a row before it got any further (out of memory?)"
    return create_trial(state=state, params=killed.params, distributions=killed.distributions, user_attrs=attributes)


# What Optuna's record of a trial says


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that count: complete, pruned, or failed for a reason of their own; in the order in which they ended."""
    counted = [trial for trial in trials if trial.state.is_finished() and not is_killed(trial)]
    return sorted(counted, key=lambda trial: trial.datetime_complete)


def running(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.RUNNING]


def is_killed(trial: FrozenTrial) -> bool:
    """Whether the trial ended because its process did."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def name_of(trial: FrozenTrial) -> str:
    """running, waiting, complete, pruned, failed or killed."""
    if is_killed(trial):
        return "killed"
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def ranked(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """Complete trials that keep all constraints by their first objective, the best first; ties: the earlier one."""
    sign = -1 if directions[0] == "maximize" else 1
    feasible = [trial for trial in trials if trial.state == TrialState.COMPLETE and max(trial.constraints.values(), default=0) <= 0]
    return sorted(feasible, key=lambda trial: (sign * trial.values[0], trial.number))


def best_of(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> FrozenTrial | None:
    """The best feasible trial, by the first objective."""
    return next(iter(ranked(trials, directions)), None)


def default_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of the default's values."""
    return next((trial for trial in trials if trial.user_attrs.get(DEFAULT) and trial.state == TrialState.COMPLETE), None)


def scores(metrics: Sequence[str], trial: FrozenTrial) -> dict[str, float]:
    """The trial's objectives, and what else it has measured."""
    if trial.state != TrialState.COMPLETE:  # Optuna gives a pruned trial its last report for a value
        return {}
    return dict(zip(metrics, trial.values, strict=True)) | trial.user_attrs.get(MEASURED, {})


def history_of(trial: FrozenTrial) -> list[Mapping[str, Any]]:
    """The records of all its epochs or batches."""
    keys = map(f"{HISTORY}/{{}}".format, itertools.count())
    return [trial.user_attrs[key] for key in itertools.takewhile(trial.user_attrs.__contains__, keys)]
