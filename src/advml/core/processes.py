"""Ends a process together with its parent, and names processes so that no later one has the same name."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time

import psutil

PARENT = "ADVML_PARENT"  # process id of the worker that started this stage, through DVC and a shell


def end_with(parent: int) -> None:
    """Send this process SIGTERM as soon as process `parent` has ended, so that a killed worker leaves no stage at work.

    Returns at once; a thread looks twice a second.
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
    """host:pid:start, the last one in hundredths of a second since the boot, which no setting of the clock changes."""
    return _name(psutil.Process())


def has_ended(process: str) -> bool:
    """Whether a process of this host is gone; of other hosts, and of names that are none, nothing is known."""
    name, _, start = process.rpartition(":")
    name, _, pid = name.rpartition(":")
    if name.partition(":")[0] != platform.node() or not pid.isdecimal():  # earlier versions wrote more behind the host
        return False
    try:
        found = psutil.Process(int(pid))
        return found.status() == psutil.STATUS_ZOMBIE or _name(found).rpartition(":")[2] != start
    except psutil.NoSuchProcess:
        return True


def _name(process: psutil.Process) -> str:
    return f"{platform.node()}:{process.pid}:{round(100 * (process.create_time() - psutil.boot_time()))}"
