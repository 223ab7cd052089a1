"""End a process together with its parent, or with its session, and give processes names that are never reused."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
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


def end_session(process: subprocess.Popen[bytes], *, grace: float) -> None:
    """End all processes of the session that a process leads (SIGTERM, after `grace` seconds SIGKILL), and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        while _is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the session still runs; zombies do not count, since in a container they may never be reaped."""
    process.poll()
    for member in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if member.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(member.pid) == process.pid:
                return True
    return False


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
