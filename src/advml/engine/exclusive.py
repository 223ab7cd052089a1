"""One command at a time: the operating system releases the lock when its holder dies, and a file beside it names that process.

On a database server the lock is a session's, which the server ends with its client.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from advml.core.errors import UserError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_MYSQL = ("SET SESSION wait_timeout = 100", "SELECT GET_LOCK(CONCAT('advml-', :key), 0)")
# The last statement takes a lock that ends with the session, and returns 1 or true if it is given; those before make the server notice
# within two minutes that the machine of a session is gone.
SESSION_LOCKS = {
    "postgresql": (
        *("SET tcp_keepalives_idle = 30", "SET tcp_keepalives_interval = 10", "SET tcp_keepalives_count = 3"),
        "SELECT pg_try_advisory_lock(:key)",
    ),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}


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


@contextlib.contextmanager
def session_lock(engine: Engine, name: str) -> Iterator[Connection | None]:
    """A session of a database server that holds the lock `name` until it ends; None: another session has it."""
    from sqlalchemy import text

    *before, take = SESSION_LOCKS[engine.url.get_backend_name()]
    with contextlib.closing(engine.connect()) as session:
        for statement in before:
            session.execute(text(statement))
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        yield session if session.execute(text(take), {"key": key}).scalar() else None


def at_work(work: str, holder: str) -> str:
    """The error's line."""
    return f"{work} already ({holder}); wait for it, or end it"


def this_process() -> str:
    """`process 123 on host`."""
    return f"process {os.getpid()} on {platform.node()}"
