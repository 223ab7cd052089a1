"""Ctrl-C, SIGTERM and SIGHUP wait until a call to the store is over."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from advml.runtime.signals import ENDING


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Signals that arrive within are obeyed at the end.

    An exception in the middle of a transaction leaves the database locked, and the run could not even be ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    replaced = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in replaced:
            signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)
