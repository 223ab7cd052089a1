"""End a process together with its parent, and give processes names that are never reused."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time

import psutil

PARENT = "ADVML_PARENT"  # environment variable: process id of the worker that started this stage, through DVC and a shell


def end_with(parent: int) -> None:
    """Send this process SIGTERM when process `parent` has ended, so that a killed worker leaves no stage running.

    Returns at once; a thread checks twice a second.
    """

    def watch() -> None:
        try:
            process = psutil.Process(parent)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)
        except psutil.NoSuchProcess:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def this_process() -> str:
    """Unique name of this process: host:pid:start, with the start in 1/100 s since boot, which does not depend on the clock."""
    return _name(psutil.Process())


def has_ended(process: str) -> bool:
    """Whether a named process of this host has ended; False for other hosts and invalid names, where this cannot be known."""
    name, _, start = process.rpartition(":")
    name, _, pid = name.rpartition(":")
    if name.partition(":")[0] != platform.node() or not pid.isdecimal():  # earlier versions used another format
        return False
    try:
        found = psutil.Process(int(pid))
        return found.status() == psutil.STATUS_ZOMBIE or _name(found).rpartition(":")[2] != start
    except psutil.NoSuchProcess:
        return True


def _name(process: psutil.Process) -> str:
    return f"{platform.node()}:{process.pid}:{round(100 * (process.create_time() - psutil.boot_time()))}"
