"""MLflow server that a group shares: runs in PostgreSQL, artifacts through the server, users with passwords.

The server is MLflow's own (`mlflow server --app-name basic-auth`); this module makes its arguments, and refuses unsafe settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

from advml.config.store import sqlite_uri
from advml.core.errors import Failure, UserError
from advml.core.messages import one_line, tell
from advml.core.passwords import masked, remember
from advml.servers import mlflow_ui

CONFIGURATION = Path(__file__).with_name("basic_auth.ini")
USER, USERS = "admin", "basic_auth.db"  # USERS: the database named in CONFIGURATION
BACKEND, PASSWORD = "MLFLOW_BACKEND_STORE_URI", "MLFLOW_AUTH_ADMIN_PASSWORD"
SHORTEST, OLD_DEFAULT = 12, "password1234"  # least length of a password that MLflow accepts; a password that it refuses
PATIENCE = 10  # seconds within which a database must answer


@dataclass(frozen=True)
class GroupServer:
    """Command, environment and address of the server, and the lines to print."""

    command: list[str]
    environment: dict[str, str]
    folder: Path
    lines: list[str]


def prepare(
    *,
    folder: Path,
    backend: str | None,
    artifacts: str | None,
    host: str,
    port: int,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> GroupServer:
    """Create the folder and the admin's password, and check the requirements of the server.

    Args:
        folder: for the database of users, the admin's password and, by default, runs and artifacts; readable only by its owner.
        backend: SQLAlchemy address of the runs' database, PostgreSQL or another; None: SQLite in the folder.
        artifacts: a folder or an address such as s3://bucket/path; None: `artifacts` in the folder.
        host: address to listen on; any other than localhost needs a certificate.
    Raises:
        UserError: a requirement is missing, or others could read a password.
        Failure: the database does not answer.
    """
    _require_safe(artifacts, host, port, tls_cert, tls_key)
    mlflow_ui.require_free(host, port)
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise UserError(f"--folder {folder}: others could replace the passwords in it; name a new one, or one that you alone can write to")
    if not any(folder.iterdir()):
        (folder / ".gitignore").write_text("*\n")
    password, place = _admin_password(folder)
    scheme = "https" if tls_cert else "http"
    environment = {
        "MLFLOW_WORKERS": "2",
        **os.environ,
        **mlflow_ui.environment(_backend(backend, folder)),
        "MLFLOW_AUTH_CONFIG_PATH": str(CONFIGURATION),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),  # for the sign-up form
        **({PASSWORD: password} if password else {}),
        **mlflow_ui.names(host, port, scheme=scheme),
    }
    artifacts = artifacts or str(folder / "artifacts")
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", host, "--port", str(port)]
    command += ["--serve-artifacts", "--artifacts-destination", artifacts if "://" in artifacts else str(Path(artifacts).resolve())]
    if tls_cert and tls_key:
        command += ["--uvicorn-opts", shlex.join(["--ssl-certfile", str(tls_cert.resolve()), "--ssl-keyfile", str(tls_key.resolve())])]
    address = f"{scheme}://{mlflow_ui.shown_host(host)}:{port}"
    lines = [
        f"MLflow: {address}     user {USER}, password {place}",
        f"runs in {masked(environment[BACKEND])}, artifacts in {artifacts}, users in {folder / USERS}",
        f"next: export MLFLOW_TRACKING_URI={address} MLFLOW_TRACKING_USERNAME={USER}, and the password as MLFLOW_TRACKING_PASSWORD",
    ]
    return GroupServer(command, environment, folder, lines)


def _require_safe(artifacts: str | None, host: str, port: int, tls_cert: Path | None, tls_key: Path | None) -> None:
    for module, needed in {"flask_wtf": True, "boto3": (artifacts or "").startswith("s3://")}.items():
        if needed and importlib.util.find_spec(module) is None:
            raise UserError(f"advml server needs {module}: pip install 'advml[server]'")
    if bool(tls_cert) != bool(tls_key):
        raise UserError("--tls-cert and --tls-key belong together")
    if host not in mlflow_ui.LOOPBACK and not tls_cert:
        raise UserError(
            f"--host {host}: passwords would cross the network unencrypted; give --tls-cert and --tls-key, "
            f"or stay on 127.0.0.1 and let others in by ssh -L {port}:127.0.0.1:{port}"
        )


def _admin_password(folder: Path) -> tuple[str | None, str]:
    """Admin password for the first start of MLflow (None: MLflow has one already), and a description of where it is kept.

    Raises:
        UserError: MLflow would refuse the given password.
    """
    file, known = folder / "admin-password", _hash_of_admin(folder)
    password, source = os.environ.get(PASSWORD), PASSWORD
    if password is None:
        source = str(file)
        if known is None and not file.exists():
            fresh = file.with_suffix(".new")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as new:
                new.write(secrets.token_urlsafe(24) + "\n")
            fresh.replace(file)
        password = file.read_text().strip() if file.exists() else None
    elif len(password) < SHORTEST or password == OLD_DEFAULT:
        raise UserError(f"{PASSWORD}: MLflow needs {SHORTEST} characters or more, and refuses its old default")
    if known is not None and password is not None:
        from werkzeug.security import check_password_hash

        if not check_password_hash(known, password):
            tell(f"warning: {source} is not the password of {USER}, which is not changed; change it in MLflow at /#/account")
            password = None
    return password, f"in {source}" if password else "as before"


def _hash_of_admin(folder: Path) -> str | None:
    """Hash of the admin's password in MLflow's database; None before the first start.

    Raises:
        UserError: the database of users is damaged.
    """
    file = folder / USERS
    if not file.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            found = connection.execute("SELECT password_hash FROM users WHERE username = ?", (USER,)).fetchone()
    except sqlite3.OperationalError:  # no tables yet
        return None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{file} is damaged ({error}); restore a copy, or remove it, which removes all users except {USER}") from None
    return found[0] if found else None


def _backend(address: str | None, folder: Path) -> str:
    """Check the address of the runs' database, and return it.

    Raises:
        UserError: the address is not valid, its driver is not installed, or its password would be visible in the list of processes.
        Failure: the database does not answer.
    """
    if address is None:
        tell("note: runs are kept in SQLite, for few writers at a time; for a group: --backend postgresql://user@host/name")
        return sqlite_uri((folder / "mlflow.db").resolve())
    import sqlalchemy

    remember(address)
    try:
        url = sqlalchemy.make_url(address)
        options = {"connect_args": {"connect_timeout": PATIENCE}} if "psycopg" in url.get_driver_name() else {}
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **options)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise UserError(f"--backend {masked(address)!r} is not a database; write postgresql://user@host/name") from None
    except ImportError as error:
        raise UserError(f"--backend {masked(address)}: {error}; for PostgreSQL: pip install 'advml[server]'") from None
    if masked(address) != address != os.environ.get(BACKEND):
        raise UserError(
            f"--backend contains a password, which the list of processes shows to all users; set {BACKEND} instead, or use ~/.pgpass"
        )
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "").resolve()
        if file.is_dir() or not file.parent.is_dir():
            why = f"{file} is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise UserError(f"--backend {masked(address)}: {why}; name a file in one that exists, e.g. sqlite:///mlflow.db")
        return sqlite_uri(file)
    try:
        engine.connect().close()
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = one_line(str(getattr(error, "orig", error)), longest=200)
        raise Failure(
            f"--backend {masked(address)}: no database answers ({reason}); "
            f"start PostgreSQL and createdb {url.database or 'mlflow'}, or leave --backend out: SQLite in {folder}"
        ) from None
    return address
