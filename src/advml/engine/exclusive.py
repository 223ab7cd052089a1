"""One command at a time: the operating system releases the lock when its holder dies, and a file beside it says who holds it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from advml.errors import UserError


@contextlib.contextmanager
def exclusive(path: Path, *, work: str) -> Iterator[None]:
    """Hold the lock `path`.lock.

    Args:
        work: what the holder does and where, for the error: "advml repro is at work in /home/me/study".
    Raises:
        UserError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(f"{path}.lock"), Path(f"{path}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{work} already ({holder.read_text()}); wait for it, or end it") from None
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()
