"""Where studies are kept: SQLite beside params.yaml, or a database server that many machines share."""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG

from advml.errors import Failure, UserError
from advml.passwords import masked, remember
from advml.tuning.locking import LOCKS, SQLITE, told
from advml.tuning.patience import PATIENCE, patiently, reason

GONE = "the study is gone: another command has thrown it away or put another one in its place"
HEARTBEAT, GRACE = 10, 60  # seconds between signs of life; how long none may come from another machine


def address(url: str | None, *, root: Path) -> str:
    """The URL of the storage; by default `optuna.db` in the workspace. Relative SQLite files start at the workspace.

    Raises:
        UserError: no database that studies can be kept in.
    """
    url = url or f"{SQLITE}optuna.db"
    remember(url)
    try:
        kind = sqlalchemy.make_url(url).get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: of a port that is no number
        kind = None
    if kind not in ("sqlite", *LOCKS):
        raise UserError(f"--storage {masked(url)!r} is no database; write sqlite:///optuna.db or postgresql://user@host/name")
    if kind != "sqlite":
        return url
    file = sqlalchemy.make_url(url).database
    if file in (None, "", ":memory:"):
        raise UserError(f"--storage {masked(url)!r} names no file; write sqlite:///optuna.db")
    return f"{SQLITE}{(root / file).resolve()}"


def connect(url: str, *, made: bool = False) -> RDBStorage:
    """Open a storage, creating its tables where they are absent; hold `locking.lock` when it may be new.

    Args:
        made: whether it is known to be there, and its tables need not be looked at.
    Raises:
        UserError: it cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # a failed trial is ours to report
    options = {"connect_args": {"timeout": PATIENCE}} if url.startswith(SQLITE) else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings(), told(url):
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
    except (StorageInternalError, RuntimeError) as error:
        raise UserError(masked(f"--storage {url} cannot be used: {reason(error)}")) from None


def _create(database: Path) -> None:
    """Make the tables in a file beside, then rename it: a kill in between leaves no half of a schema."""
    database.parent.mkdir(parents=True, exist_ok=True)
    fresh = database.with_name(f"{database.name}.new")
    fresh.unlink(missing_ok=True)
    RDBStorage(f"{SQLITE}{fresh}").engine.dispose()
    with contextlib.closing(sqlite3.connect(fresh)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # kept in the file: readers and writers do not wait for each other
    for stale in ("-wal", "-shm"):  # of a file that somebody has removed: SQLite would play its last transactions into this one
        database.with_name(f"{database.name}{stale}").unlink(missing_ok=True)
    fresh.replace(database)


def _relax(connection: sqlite3.Connection, _: object) -> None:
    """No waiting for the disk at every commit: with WAL a power cut may take the last ones, and leaves the file whole."""
    connection.execute("PRAGMA synchronous=NORMAL")


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

    ASK = ("get_study_id_from_name",)  # whether there is one

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(PatientStorage.CALLS):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return patiently(lambda: found(*arguments, **options))
            except KeyError as error:
                if name in PatientStorage.ASK or error.args != (NOT_FOUND_MSG,):
                    raise
                raise Failure(GONE) from error

        return call
