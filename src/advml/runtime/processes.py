"""Processes by names that no other process ever has: not a later one of the same number, not one of another machine or container."""

from __future__ import annotations

import functools
import os
import platform
import uuid
from pathlib import Path

import psutil

BOOT, PIDS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


def this_process() -> str:
    """machine:pid:start, which no later process shares."""
    return f"{machine()}:{os.getpid()}:{_started(os.getpid())}"


def described(process: str) -> str:
    """A process as people know it."""
    host, _, pid, _ = process.rsplit(":", 3)
    return f"process {pid} on {host}"


def pid_of(process: str) -> int | None:
    """The number of a process of this machine; None of any other, and of a name that is none."""
    where, _, own = process.rpartition(":")[0].rpartition(":")
    return int(own) if where == machine() else None


def is_dead(process: str | None) -> bool:
    """Whether a process of this machine is gone; of other machines nothing is known."""
    if process is None:
        return True
    if (pid := pid_of(process)) is None:
        return False
    try:
        return _started(pid) != process.rpartition(":")[2] or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
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
