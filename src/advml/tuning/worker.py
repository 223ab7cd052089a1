"""A worker: takes trials until there are none left. It may be killed at any moment and cleans nothing up.

What must survive is elsewhere by then: parameters and reports in the storage, the last epoch in the trial's
scratch folder. The supervisor, or the next command, finds the dead and queues their trials again.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from advml.errors import Failure, UserError
from advml.lines import one_line, tell
from advml.runtime.signals import TERMINAL
from advml.tuning import census
from advml.tuning import study as studies
from advml.tuning.patience import StorageGone
from advml.tuning.space import Values
from advml.tuning.storage import HEARTBEAT

Record = dict[str, float]

LATEST = "latest"  # attribute of a trial: what it has measured last, for people


class Search(Protocol):
    """What is searched. Picklable: every worker gets a copy."""

    name: str
    metrics: tuple[str, ...]  # names of the objectives, e.g. ("robust",)
    once: tuple[str, ...]  # what best.yaml tells of the study whoever wins, e.g. ("autoattack",)

    def definition(self) -> studies.Definition: ...
    def open(self) -> Callable[[Attempt], Sequence[float]]: ...  # the costly part: data, networks; then one call per trial
    def tags(self) -> dict[str, Any]: ...  # of the MLflow run
    def parameters(self) -> dict[str, Any]: ...  # of the MLflow run: space and budget
    def proposal(self, values: Values) -> dict[str, Any]: ...  # values -> keys of params.yaml
    def confirm(self, values: Values) -> dict[str, Any]: ...  # measures the winner once more, for best.yaml
    def measure(self, name: str) -> dict[str, Any]: ...  # one of `once`


@dataclass(frozen=True)
class Orders:
    """What a worker needs to know."""

    search: Search
    url: str
    total: int
    since: int  # trials that had finished before this command
    seed: int
    scratch: Path


@dataclass
class Attempt:
    """One trial at work, as its search sees it.

    Attributes:
        values: what the trial tries.
        scratch: a folder that a retry of this trial finds again.
        is_default: these are the default's values: the figure to beat, never pruned.
    """

    trial: optuna.Trial
    values: Values
    scratch: Path
    is_default: bool
    history: list[Record] = field(default_factory=list)

    def report(self, step: int, value: float, measured: Mapping[str, float] | None = None) -> None:
        """Tell how well it goes.

        Args:
            measured: what people are to read, where `value` only ranks.
        Raises:
            optuna.TrialPruned: compared with the others, not well enough to go on.
        """
        if measured:
            self.note(**{LATEST: measured})
        self.trial.report(value, step)
        if not self.is_default and self.trial.should_prune():
            raise optuna.TrialPruned

    def constrain(self, name: str, violation: float) -> None:
        """Say by how much a constraint is violated; at most 0: it is kept."""
        self.trial.set_constraint(name, violation)

    def note(self, **facts: Any) -> None:
        """Keep facts with the trial."""
        for key, value in facts.items():
            self.trial.set_user_attr(key, value)


def work(orders: Orders, slot: int, parent: Connection | None = None) -> None:
    """Run trials until none are left; in a process of its own, errors that stop everything are sent to the `parent`."""
    if parent is not None:
        _leave_with_command()
    try:
        definition = orders.search.definition()
        study, objective = studies.join(definition, orders.url), orders.search.open()
        while trial := studies.claim(
            study, definition, orders.url, total=orders.total, since=orders.since, seed=orders.seed + slot * 1_000_003
        ):
            run(study, trial, objective, orders.scratch)
    except (UserError, Failure) as error:
        if parent is None:
            raise
        parent.send((type(error), str(error)))


def call_and_tell(parent: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """In a process of its own: send (None, what the function returns), or an error that users are to read as (kind, text)."""
    _leave_with_command()
    try:
        told = (None, function(*arguments))
    except (UserError, Failure) as error:
        told = (type(error), str(error))
    parent.send(told)


def run(study: optuna.Study, trial: optuna.Trial, objective: Callable[[Attempt], Sequence[float]], scratch: Path) -> None:
    """One trial from start to end; whatever goes wrong in it is its result."""
    attributes = trial.user_attrs
    attempt = Attempt(trial, dict(trial.params), scratch / f"trial-{attributes[census.ORIGIN]}", attributes.get(census.DEFAULT, False))
    state, values, reason, started = TrialState.COMPLETE, None, None, time.monotonic()
    with Heart(study, trial), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        # Suppressed: the trial was thought dead, for want of heartbeats. Another one has its parameters and its scratch folder.
        try:
            values = [float(value) for value in objective(attempt)]
            if not all(map(math.isfinite, values)):
                raise Failure(f"its result is {values}")
        except (optuna.TrialPruned, optuna.exceptions.UpdateFinishedTrialError):
            state = TrialState.PRUNED
        except StorageGone:  # says nothing about the trial, which the next command takes up
            raise
        except Exception as error:
            state, values, reason = TrialState.FAIL, None, _reason(error)
        attempt.note(seconds=time.monotonic() - started, **census.in_chunks(attempt.history))
        if reason:
            attempt.note(**{census.REASON: reason})
        study.tell(trial, values=values, state=state)
        shutil.rmtree(attempt.scratch, ignore_errors=True)


def _reason(error: Exception) -> str:
    """One line; for what is nobody's mistake but ours, with the place."""
    text = one_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return "out of memory"
    if isinstance(error, (UserError, Failure)):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"


class Heart:
    """Sends signs of life while a trial runs, from a thread of its own."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial) -> None:
        self._beat = lambda: study._storage.record_heartbeat(trial._trial_id)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT):
            try:
                self._beat()
            except Exception as error:  # the database is away; the next beat may get through
                tell(f"warning: no heartbeat: {error}")


def _leave_with_command() -> None:
    """A worker whose command was killed ends at once: the same command starts its own. Signals are the supervisor's to handle."""
    for number in TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        multiprocessing.parent_process().join()  # not the server that forks workers: that one lives as long as they do
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
