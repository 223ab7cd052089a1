"""Which study this is: names and even numbers of studies come again, after one has been thrown away."""

from __future__ import annotations

import uuid

import optuna
from optuna.storages import BaseStorage

from advml.errors import Failure, UserError
from advml.runtime.processes import described, is_dead
from advml.tuning.census import PROCESS, TURNS, running
from advml.tuning.storage import GONE

# Attributes of a study
FINGERPRINT = "fingerprint"  # of what it searches
IDENTITY = "identity"  # what no other one has, also of the same name and fingerprint


def give(study: optuna.Study, *, fingerprint: str) -> None:
    """Mark a new study; the fingerprint last: who lacks it was not finished."""
    study.set_user_attr(IDENTITY, uuid.uuid4().hex[:16])
    study.set_user_attr(FINGERPRINT, fingerprint)


def fingerprint(study: optuna.Study) -> str | None:
    """Of what the study searches; None if its creator was killed."""
    return study.user_attrs.get(FINGERPRINT)


def require_same(study: optuna.Study, *, fingerprint: str) -> None:
    """Raises Failure if another command has put another study in this one's place."""
    if study.user_attrs.get(FINGERPRINT) != fingerprint:
        raise Failure(GONE)


def discard_other(storage: BaseStorage, name: str, *, fingerprint: str) -> None:
    """Throw away the study of this name if it searches something else.

    Raises:
        UserError: a process works on it: it would go on in the new one, which may even get the old one's number.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:  # there is none
        return
    if study.user_attrs.get(FINGERPRINT) in (None, fingerprint):
        return
    held = [value["process"] for key, value in study.user_attrs.items() if key.startswith(TURNS) and value]
    at_work = [trial.user_attrs.get(PROCESS) for trial in running(study.get_trials(deepcopy=False))]
    for process in held + at_work:
        if not is_dead(process):
            who = f"{described(process)} is at work on {name}"
            raise UserError(f"{who}, which --replace would throw away; end that command first, or give this one a --name of its own")
    optuna.delete_study(study_name=name, storage=storage)
