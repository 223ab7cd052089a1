"""What trials say by their states and attributes: which of them count, which is best, and who works on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from advml.runtime import processes

TURNS = "turn/"  # attributes of a study: whose turn it is to do something for all, see `tuning.turn`
# Attributes of a trial
PROCESS = "process"  # that works on it, as `processes.this_process` names it
REASON = "reason"  # why its parameters do not work
ORIGIN = "origin"  # number of the first trial of the parameters that it repeats; names the scratch folder
RETRY_OF = "retry_of"  # number of the killed trial whose parameters it repeats
KILLS = "kills"  # of processes in a row, without progress
HISTORY = "history"  # of its epochs; followed by history/1, history/2, ... where it is long
DEFAULT = "default"  # whether it has the default's values

CHUNK = 30_000  # bytes
HOPELESS = 5  # trials that all fail: so will the next


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that count: complete, pruned, or failed for a reason of their own."""
    return [trial for trial in trials if trial.state.is_finished() and not is_killed(trial)]


def running(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.RUNNING]


def is_killed(trial: FrozenTrial) -> bool:
    """Whether the trial ended because its process did."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def hopeless(trials: Sequence[FrozenTrial], *, since: int) -> bool:
    """Whether everything that this command has tried has failed, and nothing of the study has ever worked."""
    ended = sorted(finished(trials), key=lambda trial: trial.datetime_complete)
    return len(ended) - since >= HOPELESS and all(trial.state == TrialState.FAIL for trial in ended)


def feasible(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials that keep all constraints."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return [trial for trial in complete if all(violation <= 0 for violation in trial.constraints.values())]


def ranked(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """Feasible trials by their first objective, the best first; ties: the earlier one."""
    sign = -1 if directions[0] == "maximize" else 1
    return sorted(feasible(trials), key=lambda trial: (sign * trial.values[0], trial.number))


def in_chunks(history: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The curves as attributes of a trial, none of them longer than MySQL's 65,535 bytes."""
    chunks: list[list[Mapping[str, Any]]] = []
    room = 0
    for record in history:
        size = len(json.dumps(record)) + 2
        if size > room:
            chunks.append([])
            room = CHUNK
        chunks[-1].append(record)
        room -= size
    return {f"{HISTORY}/{number}" if number else HISTORY: chunk for number, chunk in enumerate(chunks)}


def history_of(trial: FrozenTrial) -> list[Mapping[str, Any]]:
    """The curves whole again."""
    found, number = list(trial.user_attrs.get(HISTORY, ())), 1
    while (key := f"{HISTORY}/{number}") in trial.user_attrs:
        found, number = found + trial.user_attrs[key], number + 1
    return found


def default_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial of the default's values."""
    return next((trial for trial in trials if trial.user_attrs.get(DEFAULT) and trial.state == TrialState.COMPLETE), None)


def pid_of(trial: FrozenTrial) -> int | None:
    """The process that works, or has worked, on a trial; None on other machines."""
    return processes.pid_of(trial.user_attrs.get(PROCESS, ""))
