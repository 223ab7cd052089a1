"""What trials say by their states and attributes: which of them count, which is best, and whose process works on them."""

from __future__ import annotations

import functools
import json
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import FrozenTrial, TrialState

TURNS = "turn/"  # attributes of a study: whose turn it is to do something for all, see `tuning.turn`
# Attributes of a trial
PROCESS = "process"  # that works on it, as `this_process` names it
REASON = "reason"  # why its parameters do not work
ORIGIN = "origin"  # number of the first trial of the parameters that it repeats; names the scratch folder
RETRY_OF = "retry_of"  # number of the killed trial whose parameters it repeats
KILLS = "kills"  # of processes in a row, without progress
HISTORY = "history"  # of its epochs; followed by history/1, history/2, ... where it is long
DEFAULT = "default"  # whether it has the default's values

BOOT, PIDS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
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


def this_process() -> str:
    """machine:pid:start, which no later process shares."""
    return f"{machine()}:{os.getpid()}:{_started(os.getpid())}"


def described(process: str) -> str:
    """A process as people know it."""
    host, _, pid, _ = process.rsplit(":", 3)
    return f"process {pid} on {host}"


def pid_of(trial: FrozenTrial) -> int | None:
    """The process that works, or has worked, on a trial; None on other machines."""
    where, pid, _ = trial.user_attrs.get(PROCESS, "::").rsplit(":", 2)
    return int(pid) if where == machine() and pid else None


def is_dead(process: str | None) -> bool:
    """Whether a process of this machine is gone; of other machines the heartbeats tell."""
    if process is None:
        return True
    where, pid, started = process.rsplit(":", 2)
    if where != machine():
        return False
    try:
        return _started(int(pid)) != started or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True


def machine() -> str:
    """host:kernel, where process ids mean what they mean here: host names are shared by containers, and clocks are set anew.

    Under Linux the kernel's boot and the namespace of process ids, elsewhere the network card.
    """
    return f"{platform.node()}:{_kernel()}"


@functools.cache
def _kernel() -> str:
    try:
        return f"{BOOT.read_text().strip()}/{PIDS.stat().st_ino}"
    except OSError:
        return f"{uuid.getnode():x}"


def _started(pid: int) -> str:
    """When a process has begun: in clock ticks since the boot, which no setting of the clock changes; elsewhere in seconds.

    Field 22 of proc_pid_stat(5). The second may hold anything, so they are counted from the last parenthesis.
    """
    if PIDS.exists():
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return f"{psutil.Process(pid).create_time():.2f}"
