"""Locks that let one command at a time work on a study or search.

In a folder: a file lock, which the operating system releases when its process dies, and a file that names this process. On a database
server: a lock of a session, which the server ends when the client is gone.
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
# Per kind of server: the last statement takes a lock that ends with the session, and returns 1 or true if it was free; the statements
# before it make the server notice within two minutes that a client's machine is gone.
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
    """Hold the file lock `path`.lock.

    Args:
        work: the work that the lock protects, for the error: "advml repro is at work in /home/me/study".
    Raises:
        UserError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(f"{path}.lock"), Path(f"{path}.holder")
    Path(lock.lock_file).touch()  # raises if the file cannot be made; FileLock would report a held lock instead
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(at_work(work, holder.read_text() if holder.exists() else "another process")) from None
    try:
        holder.write_text(holder_name())
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def session_lock(engine: Engine, name: str) -> Iterator[Connection | None]:
    """Open a session of a database server that holds the lock `name` until it ends; None if another session holds it."""
    from sqlalchemy import text

    *before, take = SESSION_LOCKS[engine.url.get_backend_name()]
    with contextlib.closing(engine.connect()) as session:
        for statement in before:
            session.execute(text(statement))
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        yield session if session.execute(text(take), {"key": key}).scalar() else None


def at_work(work: str, holder: str) -> str:
    """Error message for a lock that another process holds."""
    return f"{work} already ({holder}); wait for it, or end it"


def holder_name() -> str:
    """Description of this process: `process 123 on host`."""
    return f"process {os.getpid()} on {platform.node()}"
