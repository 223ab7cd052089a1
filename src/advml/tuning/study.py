"""One study: created once, handed out trial by trial, and never left with a dead trial. Only the driver that holds its lock calls these."""

from __future__ import annotations

import uuid
import warnings

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from advml.core.errors import UserError
from advml.tuning.search import Search
from advml.tuning.space import distributions
from advml.tuning.storage import connect
from advml.tuning.trial import Report, Result
from advml.tuning.trial_state import DEFAULT, KILLS, LATEST, ORIGIN, REACHED, REASON, RETRY_OF, is_killed, running

MOST_KILLS = 10  # in a row without progress: perhaps for want of memory
# Attributes of a study
FINGERPRINT = "fingerprint"  # of what it searches
IDENTITY = "identity"  # what no other one has, also of the same name and fingerprint


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
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(search.metrics))  # for Optuna's dashboard
    if FINGERPRINT not in study.user_attrs:  # new, or its creator was killed right here
        if not search.missed() and not study.get_trials(deepcopy=False):
            default = {key: search.default()[key] for key in search.space}
            told = {"distributions": distributions(search.space), "user_attrs": {DEFAULT: True}}
            # Not `enqueue_trial`: of its trials a kill can leave half of the parameters.
            study.add_trial(create_trial(state=TrialState.WAITING, params=default, **told))
        study.set_user_attr(IDENTITY, uuid.uuid4().hex[:16])
        study.set_user_attr(FINGERPRINT, fingerprint)
    return study


def next_trial(study: optuna.Study, search: Search, *, seed: int) -> optuna.Trial:
    """Take the next trial: one that waits, or new values.

    Args:
        seed: of the sampler, together with the number of trials so far.
    """
    study.sampler = search.sampler(seed + len(study.get_trials(deepcopy=False)))
    trial = study.ask(distributions(search.space))
    trial.set_user_attr(ORIGIN, trial.user_attrs.get(ORIGIN, trial.number))
    return trial


def note(trial: optuna.Trial, report: Report) -> bool:
    """Keep a report; returns whether the trial is to stop. The default, the one to beat, never is."""
    if report.measured:
        trial.set_user_attr(LATEST, dict(report.measured))
    trial.report(report.value, report.step)
    return not trial.user_attrs.get(DEFAULT, False) and trial.should_prune()


def finish(study: optuna.Study, trial: optuna.Trial, result: Result) -> None:
    """Keep a trial's result."""
    for name, violation in result.constraints.items():
        trial.set_constraint(name, violation)
    for key, value in result.attributes.items():
        trial.set_user_attr(key, value)
    study.tell(trial, values=result.values, state=result.state)


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
            study.add_trial(_again(trial))


def _again(trial: FrozenTrial) -> FrozenTrial:
    """The same parameters as a waiting trial; or, for one that is killed whenever it runs, as a failed one."""
    before, reached = trial.user_attrs.get(REACHED, -1), max(trial.intermediate_values, default=-1)
    kills = 0 if reached > before else trial.user_attrs.get(KILLS, 0) + 1
    attributes = {key: trial.user_attrs[key] for key in (ORIGIN, DEFAULT) if key in trial.user_attrs}
    attributes |= {RETRY_OF: trial.number, KILLS: kills, REACHED: max(reached, before)}
    state = TrialState.WAITING
    if kills > MOST_KILLS:
        state = TrialState.FAIL
        attributes[REASON] = f"killed {kills} times in a row before it got any further (out of memory?)"
    return create_trial(state=state, params=trial.params, distributions=trial.distributions, user_attrs=attributes)
