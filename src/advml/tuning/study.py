"""One study in the storage: created once, handed out trial by trial, and never left with a dead one.

Every trial is in one of these states, whatever was killed when:

| state              | means                                                                                 |
|--------------------|---------------------------------------------------------------------------------------|
| WAITING            | to be run: the default's parameters, or those of a trial whose process was killed     |
| RUNNING            | a process works on it and sends heartbeats                                            |
| COMPLETE, PRUNED   | finished                                                                              |
| FAIL with a reason | finished: its parameters do not work (NaN, out of memory)                             |
| FAIL without one   | its process was killed; another trial has its parameters and, on disk, its last epoch |

Trials are handed out, and dead ones buried, under the storage's lock, one process at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from advml.errors import UserError
from advml.runtime.processes import is_dead, this_process
from advml.tuning import identity
from advml.tuning.census import (
    DEFAULT,
    KILLS,
    ORIGIN,
    PROCESS,
    REASON,
    RETRY_OF,
    finished,
    hopeless,
    is_killed,
    running,
)
from advml.tuning.locking import lock, reach
from advml.tuning.space import Distributions, Values
from advml.tuning.storage import connect

MOST_KILLS = 10  # in a row without progress: perhaps the system itself kills it, for want of memory
CARRIED = (ORIGIN, DEFAULT)  # attributes that a retry takes over


@dataclass(frozen=True)
class Definition:
    """What a study searches, as far as the storage is concerned.

    Attributes:
        name: in the storage, in paths and in MLflow, e.g. `attack-SL-AT-s0`.
        directions: "minimize" or "maximize", one per objective.
        distributions: of every key.
        default: the values to start with and to beat; None if the space does not contain them.
        fingerprint: of space, configuration, data and weights; a study of other ones is another study.
        pruner, sampler: made anew by each process; the sampler from a seed.
    """

    name: str
    directions: tuple[str, ...]
    distributions: Distributions
    default: Values | None
    fingerprint: str
    pruner: Callable[[], optuna.pruners.BasePruner]
    sampler: Callable[[int], optuna.samplers.BaseSampler]


def create(definition: Definition, url: str, *, replace: bool = False) -> optuna.Study:
    """Create the study, or open the one that an earlier command has begun.

    Args:
        replace: whether one that searched something else is thrown away.
    Raises:
        UserError: there is a study of this name that searched something else, or one to be thrown away is at work, or the storage cannot
            be used.
    """
    reach(url)
    with lock(url):
        storage = connect(url)
        if replace:
            identity.discard_other(storage, definition.name, fingerprint=definition.fingerprint)
        study = optuna.create_study(
            study_name=definition.name,
            storage=storage,
            directions=list(definition.directions),
            pruner=definition.pruner(),
            load_if_exists=True,
        )
        begun = identity.fingerprint(study)
        if begun is None:  # new, or its creator was killed right here
            if definition.default is not None and not study.get_trials(deepcopy=False):
                study.add_trial(
                    create_trial(
                        state=TrialState.WAITING,
                        params=definition.default,
                        distributions=definition.distributions,
                        user_attrs={DEFAULT: True},
                    )
                )
            identity.give(study, fingerprint=definition.fingerprint)
        elif begun != definition.fingerprint:
            raise UserError(
                f"the study {definition.name} searched another space, or under other parameters, data or weights; "
                f"give this one a name of its own: --name {definition.name}-2, or throw that one away: --replace"
            )
    return study


def join(definition: Definition, url: str) -> optuna.Study:
    """Open a study that is there, in a worker."""
    return optuna.load_study(study_name=definition.name, storage=connect(url, made=True), pruner=definition.pruner())


def claim(study: optuna.Study, definition: Definition, url: str, *, total: int, since: int, seed: int) -> optuna.Trial | None:
    """Take the next trial, or None: as many as wanted have finished or are running, or all have failed.

    Args:
        total: finished trials wanted, of all processes and commands together.
        since: how many had finished when this command began, for `hopeless`.
        seed: of the sampler, together with the number of trials so far.
    """
    with lock(url):
        identity.require_same(study, fingerprint=definition.fingerprint)
        trials = study.get_trials(deepcopy=False)
        if len(finished(trials)) + len(running(trials)) >= total or hopeless(trials, since=since):
            return None
        study.sampler = definition.sampler(seed + len(trials))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that heartbeats are for Study.optimize: ours are sent by the worker
            trial = study.ask(definition.distributions)
        study._storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr(ORIGIN, trial.user_attrs.get(ORIGIN, trial.number))
        trial.set_user_attr(PROCESS, this_process())  # last: who lacks it died in here
        return trial


def bury(study: optuna.Study, url: str) -> None:
    """End the trials of processes that are gone, and queue their parameters again. Repeating it changes nothing."""
    with lock(url):
        for trial in running(study.get_trials(deepcopy=False)):
            if is_dead(trial.user_attrs.get(PROCESS)):
                _fail(study, trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)  # of machines that are gone
        trials = study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            if is_killed(trial) and trial.number not in retried:
                study.add_trial(_again(trial))


def _fail(study: optuna.Study, trial: FrozenTrial) -> None:
    try:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # it ended after all
        return


def _again(trial: FrozenTrial) -> FrozenTrial:
    """The same parameters as a waiting trial; or, for one that is killed whenever it runs, as a failed one."""
    reached = max(trial.intermediate_values, default=-1)
    progressed = reached > trial.user_attrs.get("reached", -1)
    kills = 0 if progressed else trial.user_attrs.get(KILLS, 0) + 1
    carried = {key: trial.user_attrs[key] for key in CARRIED if key in trial.user_attrs}
    attributes = {**carried, RETRY_OF: trial.number, KILLS: kills, "reached": max(reached, trial.user_attrs.get("reached", -1))}
    given_up = kills > MOST_KILLS
    if given_up:
        attributes[REASON] = f"killed {kills} times in a row before it got any further, perhaps for want of memory"
    return create_trial(
        state=TrialState.FAIL if given_up else TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=attributes,
    )
