"""Database of the searches (Optuna's studies): SQLite beside params.yaml, or a server; only one driver at a time works on a study."""

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
from advml.core.exclusive import SESSION_LOCKS, at_work, exclusive, session_lock
from advml.core.passwords import masked, remember

SQLITE = "sqlite:///"
TIMEOUT = {"connect_timeout": 10}  # seconds
HOLDER = "driver"  # attribute of a study: the process that holds, or held, its lock; for `alone`
# SQL drivers with the option connect_timeout -> package that installs them
DRIVERS = {"psycopg": "advml[server]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "mysqldb": "mysqlclient"}


def address(url: str | None, *, root: Path) -> str:
    """URL of the database; by default `optuna.db` in the workspace. Relative SQLite paths start at the workspace.

    Raises:
        UserError: the URL is not a supported database.
    """
    url = url or f"{SQLITE}optuna.db"
    remember(url)
    try:
        parsed = sqlalchemy.make_url(url)
        kind = parsed.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is not a number
        kind = None
    if kind in SESSION_LOCKS:
        return url
    if kind != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise UserError(f"--storage {masked(url)!r} is not a database; write sqlite:///optuna.db or postgresql://user@host/name")
    return f"{SQLITE}{(root / parsed.database).resolve()}"


def connect(url: str) -> RDBStorage:
    """Open a database, creating missing tables; raises UserError if it cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # advml reports failed trials itself
    with _as_user_error(url):
        if not url.startswith(SQLITE):
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": _timeout(url)})
        file = Path(url.removeprefix(SQLITE))
        if not file.exists():  # remove journals of a deleted database, which SQLite would apply to the new one
            for stale in ("-wal", "-shm"):
                file.with_name(f"{file.name}{stale}").unlink(missing_ok=True)
        storage = RDBStorage(url)
        sqlalchemy.event.listen(storage.engine, "connect", _without_waiting_for_the_disk)
        storage.engine.dispose()  # close connections that were opened with other settings
        return storage


def _without_waiting_for_the_disk(connection: sqlite3.Connection, _: object) -> None:
    """Set SQLite not to wait for the disk: a power cut may lose the last transactions, but does not damage the file."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _timeout(url: str) -> dict[str, int]:
    """Connection options with a time limit for a server's answer, unless the URL sets one."""
    parsed = sqlalchemy.make_url(url)
    return TIMEOUT if parsed.get_driver_name() in DRIVERS and not parsed.query.keys() & TIMEOUT else {}


@contextlib.contextmanager
def alone(url: str, name: str) -> Iterator[Callable[[], None]]:
    """Context manager that holds a study's lock (with SQLite, that of the file); yields a function that raises Failure if it is lost.

    Raises:
        UserError: another process holds the lock, or the database cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        if url.startswith(SQLITE):
            with _as_user_error(url):
                file = Path(url.removeprefix(SQLITE))
                stack.enter_context(exclusive(file, work=f"advml tune is at work on {file}"))
            yield lambda: None
            return
        with _as_user_error(url):
            engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool, connect_args=_timeout(url))
            session = stack.enter_context(session_lock(engine, f"{engine.url.database} {name}"))
        if session is None:
            raise UserError(at_work(f"advml tune is at work on {name}", _holder(url, name)))
        yield as_failure()(lambda: session.execute(sqlalchemy.text("SELECT 1")))


def close(study: optuna.Study) -> None:
    """Close the connections of a study."""
    study._storage.remove_session()
    study._storage._backend.engine.dispose()


def _holder(url: str, name: str) -> str:
    storage, who = connect(url), "another process"
    with contextlib.suppress(KeyError):  # the study does not exist yet
        who = storage.get_study_user_attrs(storage.get_study_id_from_name(name)).get(HOLDER, who)
    storage.remove_session()
    storage.engine.dispose()
    return who


@contextlib.contextmanager
def as_failure() -> Iterator[None]:
    """Context manager that converts errors of a database in use to a Failure of one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise Failure(f"the searches' database failed: {_reason(error)}; repeat the command, which goes on from here") from error
    except KeyError as error:
        if error.args != (NOT_FOUND_MSG,):
            raise
        raise Failure("the search was deleted from the database") from error


@contextlib.contextmanager
def _as_user_error(url: str) -> Iterator[None]:
    """Context manager that converts errors in opening a database to a UserError of one line."""
    try:
        yield
    except ImportError:
        driver = sqlalchemy.make_url(url).get_driver_name()
        raise UserError(f"--storage {masked(url)} needs the driver {driver}: pip install '{DRIVERS.get(driver, driver)}'") from None
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError, OSError) as error:
        raise UserError(masked(f"--storage {url} cannot be used: {_reason(error)}")) from None


def _reason(error: BaseException) -> str:
    """First line of a database's error message."""
    cause = error.__cause__ or error
    return (getattr(cause, "strerror", None) or str(getattr(cause, "orig", None) or cause).strip() or type(cause).__name__).split("\n")[0]
