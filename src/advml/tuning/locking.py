"""One process at a time, on all machines that share a storage: a file beside SQLite's, or a lock of the server's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from filelock import FileLock, Timeout

from advml.errors import UserError
from advml.passwords import masked
from advml.tuning.patience import StorageGone, patiently, reason

SQLITE = "sqlite:///"
LOCK_PATIENCE = 120  # seconds; longer than a server needs to notice that the holder's machine is gone
CONNECT_PATIENCE = 10  # seconds that a server may take to answer the first time
# What a driver calls that, and how it is installed
DRIVERS = {
    "psycopg": ("connect_timeout", "advml[postgres]"),
    "psycopg2": ("connect_timeout", "psycopg2-binary"),
    "pg8000": ("timeout", "pg8000"),
    "pymysql": ("connect_timeout", "pymysql"),
    "mysqldb": ("connect_timeout", "mysqlclient"),
    "mysqlconnector": ("connection_timeout", "mysql-connector-python"),
    "mariadbconnector": ("connect_timeout", "mariadb"),
}


@dataclass(frozen=True)
class ServerLock:
    """How a server gives one session the right to hand out trials. It ends with the session, however that dies.

    Attributes:
        before: statements by which the session of a machine that is gone ends within a minute or two, not in hours.
        take: waits for the lock; returns 1 or nothing if it was given.
        given: what `take` returns then.
        holders: shows an administrator who has it.
    """

    before: tuple[str, ...]
    take: str
    given: tuple[object, ...]
    holders: str


_MYSQL = ServerLock(
    (f"SET SESSION wait_timeout = {LOCK_PATIENCE - 20}",),  # the lock's own session is idle, for as long as a trial is handed out
    f"SELECT GET_LOCK(CONCAT('advml-', LEFT(DATABASE(), 50)), {LOCK_PATIENCE})",  # names are the whole server's
    (1,),  # 0: out of time, NULL: an error
    "SHOW PROCESSLIST",
)
LOCKS = {
    "postgresql": ServerLock(
        (
            "SET tcp_keepalives_idle = 30",
            "SET tcp_keepalives_interval = 10",
            "SET tcp_keepalives_count = 3",
            f"SET lock_timeout = '{LOCK_PATIENCE}s'",
        ),
        "SELECT pg_advisory_lock(hashtext('advml'))",
        (None, ""),  # void
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory'",
    ),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
OUT_OF_TIME = "55P03"  # PostgreSQL's lock_not_available


@contextlib.contextmanager
def lock(url: str) -> Iterator[None]:
    """Hold the lock: who creates studies, hands out trials, or buries dead ones.

    Raises:
        UserError: the storage cannot be used.
        StorageGone: another process has had the lock for two minutes, or the server does not answer.
    """
    if url.startswith(SQLITE):
        with _file_lock(Path(f"{url.removeprefix(SQLITE)}.lock")):
            yield
        return
    with told(url):
        connection = patiently(lambda: _locked(url))
    try:
        yield
    finally:
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # the server has cut it: the lock is gone already
            connection.close()


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    try:
        if not path.exists():  # FileLock waits where the folder is absent
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        held = FileLock(path, timeout=LOCK_PATIENCE)
        held.acquire()
    except Timeout:
        raise StorageGone(f"another process has held {path} for {LOCK_PATIENCE} s; end it, then the same command goes on") from None
    except OSError as error:
        raise UserError(f"--storage {SQLITE}{str(path).removesuffix('.lock')} cannot be used: {error.strerror or error}") from None
    try:
        yield
    finally:
        held.release()


def reach(url: str) -> None:
    """One attempt to connect to a server, so that a wrong address costs seconds.

    Raises:
        UserError: with what the server said.
    """
    if not url.startswith(SQLITE):
        with told(url):
            _unpooled(url).connect().close()


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """What is wrong with a storage, in one line without its password."""
    try:
        yield
    except ImportError:
        driver = _driver(url)
        package = DRIVERS.get(driver, (None, driver))[1]
        raise UserError(f"--storage {masked(url)} needs the driver {driver}: pip install '{package}'") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise UserError(masked(f"--storage {url} cannot be used: {reason(error)}")) from None


def _driver(url: str) -> str:
    return sqlalchemy.make_url(url).get_driver_name()


def _locked(url: str) -> sqlalchemy.Connection:
    """A session that holds the lock until it is closed."""
    engine = _unpooled(url)
    kind, connection = LOCKS[engine.dialect.name], engine.connect()
    try:
        for statement in kind.before:
            connection.execute(sqlalchemy.text(statement))
        given = _is_given(connection, kind)
    except BaseException:
        connection.close()
        raise
    if not given:
        connection.close()
        raise StorageGone(
            f"another process holds the lock of the studies' database and has not given it back for {LOCK_PATIENCE} s; "
            f"if its machine is gone, end its session ({kind.holders}), then the same command goes on"
        )
    return connection


def _is_given(connection: sqlalchemy.Connection, kind: ServerLock) -> bool:
    try:
        return connection.execute(sqlalchemy.text(kind.take)).scalar() in kind.given
    except sqlalchemy.exc.OperationalError as error:
        if OUT_OF_TIME in (getattr(error.orig, "sqlstate", None), getattr(error.orig, "pgcode", None)):
            return False
        raise


@functools.cache
def _unpooled(url: str) -> sqlalchemy.Engine:
    """Whose connections are closed after use, and with them the locks that they hold."""
    option = DRIVERS.get(_driver(url), (None,))[0]
    given = option in sqlalchemy.make_url(url).query
    return sqlalchemy.create_engine(
        url, poolclass=sqlalchemy.NullPool, connect_args={option: CONNECT_PATIENCE} if option and not given else {}
    )
