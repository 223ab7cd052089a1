"""Ends a process when the one that it works for is gone, so that a killed worker leaves no stage at work."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

PARENT = "ADVML_PARENT"  # process id of the worker that started this stage, through DVC and a shell


def end_with(parent: int) -> None:
    """Send this process SIGTERM as soon as process `parent` has ended. Returns at once; a thread looks twice a second."""

    def watch() -> None:
        try:
            process = psutil.Process(parent)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)
        except psutil.NoSuchProcess:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
