"""A trial in the process that runs it: what it tries, what it reports on the way, and how it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from advml.core.errors import Failure
from advml.engine import process_task
from advml.tuning.space import Values
from advml.tuning.trial_state import MEASURED, REASON, SECONDS, history_attributes

if TYPE_CHECKING:
    from advml.tuning.search import Search

Objective = Callable[["Attempt"], Sequence[float]]  # runs a trial; returns its objectives
_opened: tuple[Search, Objective] | None = None  # data and networks serve all trials of a process


@dataclass(frozen=True)
class Report:
    """How a trial does at a step: the value that the pruner compares, and what people are to read in its place."""

    step: int
    value: float
    measured: Mapping[str, float] | None = None


@dataclass
class Attempt:
    """A trial at work, as its search sees it.

    Attributes:
        values: what the trial tries.
        scratch: a folder that a retry of this trial finds again.
        ask: gives the driver a report and returns whether to stop.
        history: a record per epoch or batch.
        measured: figures beside the objectives.
        constraints: by how much each is violated; at most 0: it is kept.
    """

    values: Values
    scratch: Path
    ask: Callable[[Report], bool] = process_task.ask
    history: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)

    def report(self, step: int, value: float, measured: Mapping[str, float] | None = None) -> None:
        """Report how it does. Raises optuna.TrialPruned if that is not well enough to go on."""
        if self.ask(Report(step, value, measured)):
            raise optuna.TrialPruned


@dataclass(frozen=True)
class Result:
    """How a trial has ended: values if complete, a reason among the attributes if failed."""

    state: TrialState
    values: list[float] | None
    attributes: dict[str, Any]
    constraints: dict[str, float]


def run_trial(search: Search, values: Values, scratch: Path) -> Result:
    """One trial, in a process of its own. Raises UserError or Failure if the search cannot be opened."""
    global _opened
    if _opened is None or _opened[0] != search:
        _opened = search, search.open()
    return result_of(_opened[1], Attempt(values, scratch))


def result_of(objective: Objective, attempt: Attempt) -> Result:
    """One trial from start to end; whatever goes wrong in it is its result."""
    started, values, reason = time.monotonic(), None, {}
    try:
        values, state = [float(value) for value in objective(attempt)], TrialState.COMPLETE
        if not all(map(math.isfinite, values)):
            raise Failure(f"its result is {values}")
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Exception as error:
        state, values, reason = TrialState.FAIL, None, {REASON: process_task.described(error)}
    measured = {MEASURED: attempt.measured} if attempt.measured else {}
    attributes = {**measured, SECONDS: time.monotonic() - started, **history_attributes(attempt.history), **reason}
    return Result(state, values, attributes, attempt.constraints)
