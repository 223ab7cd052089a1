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
    Path(lock.lock_file).touch()  # FileLock takes a file that it cannot make for one that is locked
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(at_work(work, holder.read_text() if holder.exists() else "another process")) from None
    try:
        holder.write_text(this_process())
        yield
    finally:
        lock.release()


def at_work(work: str, who: str) -> str:
    """The error's line."""
    return f"{work} already ({who}); wait for it, or end it"


def this_process() -> str:
    """As people know it."""
    return f"process {os.getpid()} on {platform.node()}"
