"""Signal handling: the first signal ends a command in order; further ones shortly after it are ignored."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

# Signals sent to every process of a terminal: by Ctrl-C, and when it is closed. Windows has no SIGHUP.
TERMINAL = tuple(signal.Signals[name] for name in ("SIGINT", "SIGHUP") if name in signal.Signals.__members__)
ENDING = (*TERMINAL, signal.SIGTERM)
GRACE = 10.0  # seconds after the first signal in which others are ignored


def obey() -> None:
    """Turn ENDING into exceptions in the main thread: KeyboardInterrupt for Ctrl-C, SystemExit(128 + number) for the others.

    The exception closes what is open: it ends an MLflow run and rolls back a transaction. A second exception meanwhile would leave the
    run RUNNING for ever, and repeated signals are common: from Docker and DVC, from a terminal and its shell. So signals within GRACE
    seconds of the first are ignored; a later one raises again. A signal that was ignored at the start (`nohup`, commands in the
    background) stays ignored.
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
    """Context manager that delays signals until its end.

    An exception in the middle of a transaction would leave the database locked, so that the run could not be ended.
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
