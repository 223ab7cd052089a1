"""The database of the studies: SQLite beside params.yaml, or a server. One process at a time, the driver of a search, works on a study."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG

from advml.core.errors import Failure, UserError
from advml.core.passwords import masked, remember
from advml.engine.exclusive import SESSION_LOCKS, at_work, exclusive, session_lock

SQLITE = "sqlite:///"
TIMEOUT = {"connect_timeout": 10}  # seconds
HOLDER = "driver"  # attribute of a study: the process that works on it, or has; for `alone`
# Drivers that know the option connect_timeout -> how they are installed
DRIVERS = {"psycopg": "advml[server]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "mysqldb": "mysqlclient"}


def address(url: str | None, *, root: Path) -> str:
    """The URL of the database; by default `optuna.db` in the workspace. Relative SQLite files start at the workspace.

    Raises:
        UserError: no database that studies can be kept in.
    """
    url = url or f"{SQLITE}optuna.db"
    remember(url)
    try:
        parsed = sqlalchemy.make_url(url)
        kind = parsed.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: of a port that is no number
        kind = None
    if kind in SESSION_LOCKS:
        return url
    if kind != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise UserError(f"--storage {masked(url)!r} names no database; write sqlite:///optuna.db or postgresql://user@host/name")
    return f"{SQLITE}{(root / parsed.database).resolve()}"


def connect(url: str) -> RDBStorage:
    """Open a database, creating its tables where they are absent. Raises UserError if it cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # a failed trial is ours to report
    with _usable(url):
        if not url.startswith(SQLITE):
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": _timeout(url)})
        file = Path(url.removeprefix(SQLITE))
        if not file.exists():  # SQLite would play the last transactions of a database that somebody has removed into the new one
            for stale in ("-wal", "-shm"):
                file.with_name(f"{file.name}{stale}").unlink(missing_ok=True)
        storage = RDBStorage(url)
        sqlalchemy.event.listen(storage.engine, "connect", _without_waiting_for_the_disk)
        storage.engine.dispose()  # the connections from before
        return storage


def _without_waiting_for_the_disk(connection: sqlite3.Connection, _: object) -> None:
    """A power cut may take the last transactions, and leaves the file whole."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _timeout(url: str) -> dict[str, int]:
    """How long a server may take to answer, unless the URL says so."""
    parsed = sqlalchemy.make_url(url)
    return TIMEOUT if parsed.get_driver_name() in DRIVERS and not parsed.query.keys() & TIMEOUT else {}


@contextlib.contextmanager
def alone(url: str, name: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of a study, of the whole file with SQLite; yields a function that raises Failure if the lock is lost.

    Raises:
        UserError: another process has it, or the database cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        if url.startswith(SQLITE):
            with _usable(url):
                file = Path(url.removeprefix(SQLITE))
                stack.enter_context(exclusive(file, work=f"advml tune is at work on {file}"))
            yield lambda: None
            return
        with _usable(url):
            engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool, connect_args=_timeout(url))
            session = stack.enter_context(session_lock(engine, f"{engine.url.database} {name}"))
        if session is None:
            raise UserError(at_work(f"advml tune is at work on {name}", _holder(url, name)))
        yield told()(lambda: session.execute(sqlalchemy.text("SELECT 1")))


def close(study: optuna.Study) -> None:
    """Close the connections of a study."""
    study._storage.remove_session()
    study._storage._backend.engine.dispose()


def _holder(url: str, name: str) -> str:
    storage, who = connect(url), "another process"
    with contextlib.suppress(KeyError):  # it has not begun yet
        who = storage.get_study_user_attrs(storage.get_study_id_from_name(name)).get(HOLDER, who)
    storage.remove_session()
    storage.engine.dispose()
    return who


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns errors of a database in use into one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise Failure(f"the studies' database failed: {_reason(error)}; the same command goes on") from error
    except KeyError as error:
        if error.args != (NOT_FOUND_MSG,):
            raise
        raise Failure("the study is gone: it was deleted from the database") from error


@contextlib.contextmanager
def _usable(url: str) -> Iterator[None]:
    """Turns what is wrong with a database into one line."""
    try:
        yield
    except ImportError:
        driver = sqlalchemy.make_url(url).get_driver_name()
        raise UserError(f"--storage {masked(url)} needs the driver {driver}: pip install '{DRIVERS.get(driver, driver)}'") from None
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError, OSError) as error:
        raise UserError(masked(f"--storage {url} cannot be used: {_reason(error)}")) from None


def _reason(error: BaseException) -> str:
    """The first line of what the database said."""
    cause = error.__cause__ or error
    return (getattr(cause, "strerror", None) or str(getattr(cause, "orig", None) or cause).strip() or type(cause).__name__).split("\n")[0]
