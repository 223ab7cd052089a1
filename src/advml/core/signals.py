"""Signals that end a command: the first one ends it in order, and those that follow at once do not disturb the end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

# Sent to every process of a terminal: by Ctrl-C, and when it is closed. There is no SIGHUP on Windows.
TERMINAL = tuple(signal.Signals[name] for name in ("SIGINT", "SIGHUP") if name in signal.Signals.__members__)
ENDING = (*TERMINAL, signal.SIGTERM)
GRACE = 10.0  # seconds


def obey() -> None:
    """Turn ENDING into exceptions in the main thread: KeyboardInterrupt for Ctrl-C, SystemExit(128 + number) for the others.

    What is open is closed in order then: an MLflow run is ended, a transaction rolled back. A second exception in the middle would
    leave a run RUNNING for ever, and several signals are common: from Docker and from DVC, from a terminal and from its shell. So
    within GRACE seconds of the first one, others are the same request; a later one counts again. Signals that are ignored (`nohup`,
    commands in the background) stay so.
    """
    until = 0.0

    def leave(number: int, _: FrameType | None) -> None:
        nonlocal until
        if time.monotonic() < until:
            return
        until = time.monotonic() + GRACE
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Signals that arrive within are obeyed at the end.

    An exception in the middle of a transaction leaves the database locked, and the run could not even be ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    replaced = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}
    try:
        for number in replaced:
            signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)
