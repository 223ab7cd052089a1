"""Where studies are kept: SQLite beside params.yaml, or a database server that many machines share."""

from __future__ import annotations

import contextlib
import functools
import random
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from advml.errors import Failure, UserError

T = TypeVar("T")
SQLITE = "sqlite:///"
HEARTBEAT, GRACE = 10, 60  # seconds between signs of life; how long none may come from another machine
PATIENCE = 60.0  # seconds that a busy or restarting database is waited for
# How a server gives one session at a time the right to hand out trials. It ends with the session, however that dies.
LOCKS = {
    "postgresql": "SELECT pg_advisory_lock(hashtext('advml'))",
    "mysql": "SELECT GET_LOCK('advml', 600)",
    "mariadb": "SELECT GET_LOCK('advml', 600)",
}


def address(url: str | None, *, root: Path) -> str:
    """The URL of the storage; by default `optuna.db` in the workspace. Relative SQLite files start at the workspace.

    Raises:
        UserError: no database that studies can be kept in.
    """
    url = url or f"{SQLITE}optuna.db"
    try:
        kind = sqlalchemy.make_url(url).get_backend_name()
    except sqlalchemy.exc.ArgumentError:
        kind = url.partition(":")[0]
    if kind not in ("sqlite", *LOCKS):
        raise UserError(f"--storage {without_password(url)!r} is no database; write sqlite:///optuna.db or postgresql://user@host/name")
    return f"{SQLITE}{(root / url.removeprefix(SQLITE)).resolve()}" if kind == "sqlite" else url


def connect(url: str, *, made: bool = False) -> RDBStorage:
    """Open a storage, creating its tables where they are absent; hold `lock` when it may be new.

    Args:
        made: whether it is known to be there, and its tables need not be looked at.
    Raises:
        UserError: it cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # a failed trial is ours to report
    options = {"connect_args": {"timeout": PATIENCE}} if url.startswith(SQLITE) else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
            if url.startswith(SQLITE) and not Path(url.removeprefix(SQLITE)).exists():
                _create(Path(url.removeprefix(SQLITE)))
            storage = PatientStorage(
                url,
                engine_kwargs=options,
                skip_compatibility_check=made,
                skip_table_creation=made,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
            )
            if url.startswith(SQLITE):
                sqlalchemy.event.listen(storage.engine, "connect", _relax)
                storage.engine.dispose()  # the connections from before
            return storage
    except ImportError:
        raise UserError(f"--storage {without_password(url)} needs a driver; for PostgreSQL: pip install 'advml[postgres]'") from None
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise UserError(f"--storage {without_password(url)} cannot be used: {_reason(error)}") from None


def _create(database: Path) -> None:
    """Make the tables in a file beside, then rename it: a kill in between leaves no half of a schema."""
    database.parent.mkdir(parents=True, exist_ok=True)
    fresh = database.with_name(f"{database.name}.new")
    fresh.unlink(missing_ok=True)
    RDBStorage(f"{SQLITE}{fresh}").engine.dispose()
    with contextlib.closing(sqlite3.connect(fresh)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # kept in the file: readers and writers do not wait for each other
    fresh.replace(database)


def _relax(connection: sqlite3.Connection, _: object) -> None:
    """No waiting for the disk at every commit: with WAL a power cut may take the last ones, and leaves the file whole."""
    connection.execute("PRAGMA synchronous=NORMAL")


class StorageGone(Failure):
    """The database does not answer: whatever was at work is not to blame."""


class PatientStorage(RDBStorage):
    """Optuna's storage, whose single calls wait for a database that is busy, and come back to one that was restarted.

    Every call is one transaction, so it may be repeated. A call that was committed although it seemed to fail leaves at
    worst a trial without a process, which is buried like one that was killed.
    """

    CALLS = (
        "get_",
        "set_",
        "record_",
        "create_new_trial",
        "_create_new_trial",
        "_get_trials",
        "_get_stale",
        "_get_best",
        "_set_trial_param",
    )

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(PatientStorage.CALLS):
            return found
        return lambda *arguments, **options: patiently(lambda: found(*arguments, **options))


@contextlib.contextmanager
def lock(url: str) -> Iterator[None]:
    """One process at a time, on all machines that share the storage: who creates studies, hands out trials, or buries dead ones.

    Raises:
        UserError: the server cannot be reached.
    """
    if url.startswith(SQLITE):
        with FileLock(f"{url.removeprefix(SQLITE)}.lock"):
            yield
        return
    try:
        connection = patiently(lambda: _locked(url))
    except ImportError:
        raise UserError(f"--storage {without_password(url)} needs a driver; for PostgreSQL: pip install 'advml[postgres]'") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise UserError(f"--storage {without_password(url)} cannot be used: {_reason(error)}") from None
    try:
        yield
    finally:
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # the server has cut it: the lock is gone already
            connection.close()


def _locked(url: str) -> sqlalchemy.Connection:
    """A session that holds the lock until it is closed."""
    engine = _unpooled(url)
    connection = engine.connect()
    try:
        connection.execute(sqlalchemy.text(LOCKS[engine.dialect.name]))
    except BaseException:
        connection.close()
        raise
    return connection


@functools.cache
def _unpooled(url: str) -> sqlalchemy.Engine:
    """Whose connections are closed after use, and with them the locks that they hold."""
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


def patiently(action: Callable[[], T]) -> T:
    """`action()`, again and again while the database is busy or away; use it for what may be done twice.

    Raises:
        StorageGone: it has been so for a minute.
    """
    give_up, pause = time.monotonic() + PATIENCE, 0.01
    while True:
        try:
            return action()
        except (StorageInternalError, sqlalchemy.exc.OperationalError) as error:
            if time.monotonic() > give_up:
                raise StorageGone(f"the studies' database does not answer: {_reason(error)}; the same command goes on") from error
            time.sleep(pause * random.uniform(0.5, 1.5))  # together with others, so not in step with them
            pause = min(2 * pause, 2.0)


def without_password(url: str) -> str:
    """postgresql://user:password@host -> postgresql://user:***@host"""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url


def _reason(error: BaseException) -> str:
    """The first line of what the database said."""
    cause = error.__cause__ or error
    return str(getattr(cause, "orig", None) or cause).strip().split("\n")[0]
