"""What Optuna's record of a trial says: which trials count, and which is best.

| state              | means                                                                                 |
|--------------------|---------------------------------------------------------------------------------------|
| WAITING            | to be run: the default's parameters, or those of a trial whose process was killed     |
| RUNNING            | a process works on it                                                                 |
| COMPLETE, PRUNED   | finished                                                                              |
| FAIL with a reason | finished: its parameters do not work (NaN, out of memory)                             |
| FAIL without one   | its process was killed; another trial has its parameters and, on disk, its last epoch |
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

# Attributes of a trial
REASON = "reason"  # why its parameters do not work
ORIGIN = "origin"  # number of the first trial of the parameters that it repeats; names the scratch folder
RETRY_OF = "retry_of"  # number of the killed trial whose parameters it repeats
HISTORY = "epoch"  # epoch/0, epoch/1, ...: what it has recorded, apart because an attribute holds 65,535 bytes in MySQL
DEFAULT = "default"  # whether it has the default's values
LATEST = "latest"  # what it has measured last, for people
MEASURED = "measured"  # figures beside the objectives
SECONDS = "seconds"  # that it took


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
