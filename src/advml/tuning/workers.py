"""What the processes of a search do: run trials, one after another, on data and networks that are opened once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from advml.engine.process_task import described
from advml.errors import Failure
from advml.tuning.search import Attempt, Search
from advml.tuning.space import Values
from advml.tuning.study import Result
from advml.tuning.trial_state import MEASURED, REASON, SECONDS, history_attributes

# What the driver's fork server imports for them; the last ones are what Optuna and the figures import when they are first used.
MODULES = (
    *("advml.cli", "advml.tuning.attack_trial", "advml.tuning.training_trial", "advml.tuning.outputs", "advml.figures.style"),
    *("optuna.importance", "optuna.visualization.matplotlib"),
)
_opened: tuple[Search, Callable[[Attempt], Sequence[float]]] | None = None


def run_trial(search: Search, values: Values, scratch: Path) -> Result:
    """One trial, in a process of its own. Raises UserError or Failure if the search cannot be opened."""
    global _opened
    if _opened is None or _opened[0] != search:
        _opened = search, search.open()
    return result_of(_opened[1], Attempt(values, scratch))


def result_of(objective: Callable[[Attempt], Sequence[float]], attempt: Attempt) -> Result:
    """One trial from start to end; whatever goes wrong in it is its result."""
    started, values, reason = time.monotonic(), None, {}
    try:
        values, state = [float(value) for value in objective(attempt)], TrialState.COMPLETE
        if not all(map(math.isfinite, values)):
            raise Failure(f"its result is {values}")
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Exception as error:
        state, values, reason = TrialState.FAIL, None, {REASON: described(error)}
    measured = {MEASURED: attempt.measured} if attempt.measured else {}
    attributes = {**measured, SECONDS: time.monotonic() - started, **history_attributes(attempt.history), **reason}
    return Result(state, values, attributes, attempt.constraints)
