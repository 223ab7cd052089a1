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


def is_dead(process: str) -> bool:
    """Whether a process of this machine is gone; of other machines nothing is known."""
    name, _, started = process.rpartition(":")
    where, _, pid = name.rpartition(":")
    if where != machine():
        return False
    try:
        return _started(int(pid)) != started or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True


def is_orphaned(process: str) -> bool:
    """Whether a process is dead, or of an earlier boot of this host, as far as names tell; the number alone decides for `host:pid`.

    A container that was started anew under its old name is another machine: nothing is known of its processes.
    """
    node, _, rest = process.partition(":")
    if not node or node != platform.node():
        return False
    if rest.isdecimal():  # as advml named them before
        return not psutil.pid_exists(int(rest))
    boot, ours = ("/" in kernel and kernel.split("/")[0] for kernel in (rest, _kernel()))
    return is_dead(process) or bool(boot and ours and boot != ours)


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
