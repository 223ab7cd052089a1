"""One command at a time: a lock file that the operating system releases when its holder dies, and a file that says who it is."""

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
    """Hold `path`.lock.

    Args:
        path: without suffix; the holder's name goes to `path`.holder.
        work: the start of the error, e.g. "advml repro is at work in /home/me/study".
    Raises:
        UserError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(f"{path}.lock"), Path(f"{path}.holder")
    Path(lock.lock_file).touch()  # FileLock itself takes a file that it cannot make for one that is locked
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise UserError(at_work(work, who)) from None
    try:
        holder.write_text(this_process(), encoding="utf-8")
        yield
    finally:
        lock.release()


def at_work(work: str, who: str) -> str:
    """The error's line."""
    return f"{work} already ({who}); wait for it, or end it"


def this_process() -> str:
    """As people know it."""
    return f"process {os.getpid()} on {platform.node()}"
