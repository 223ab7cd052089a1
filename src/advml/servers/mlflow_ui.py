"""MLflow's UI: link to the study's table of results, and a local server."""

from __future__ import annotations

import errno
import http.client
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from advml.config.store import Place
from advml.core.errors import Failure, UserError
from advml.core.passwords import masked
from advml.core.processes import end_session
from advml.tracking import store as stores

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # addresses that mean all networks of the machine
INTERNET = (socket.AF_INET, socket.AF_INET6)
GRACE = 5.0  # seconds for the server to end after SIGTERM
TRIED = 100  # number of ports tried after the requested one


def link(place: Place, *, host: str = "127.0.0.1", port: int = 5000) -> str:
    """Address of the experiment's table of results in the UI, local on `host` and `port` or that of the tracking server.

    Raises:
        UserError: MLflow does not support the configured store, or the server refuses user or password.
        Failure: a local store cannot be opened.
    """
    base = masked(re.sub(r"//\S*@", "//", place.uri)).rstrip("/") if place.is_server else f"http://{shown_host(host)}:{port}"
    try:
        store = stores.connect(place)
        stores.save_view(store.client, store.experiment)
    except UserError:
        raise
    except Exception as error:
        if not place.is_server:
            raise Failure(f"{stores.explain(place, error)}; repair the store or name another with -S tracking.uri=...") from error
        stores.give_up(place, error, then="the link is that of the server, not of the experiment")
        return base
    return f"{base}/#/experiments/{store.experiment}/runs?viewStateShareKey={stores.VIEW_KEY}&{stores.UI_MODE}"


def command(place: Place, *, host: str = "127.0.0.1", port: int = 5000) -> tuple[list[str], dict[str, str]] | None:
    """Command and environment of a local UI for the store of `link`; None for a tracking server, which has its own UI.

    Raises:
        UserError: MLflow does not support the configured store.
    """
    if place.refused:
        raise UserError(place.refused)
    if place.is_server:
        return None
    server = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    return [*server, "--host", host, "--port", str(port)], {**os.environ, **environment(place.uri), **names(host, port)}


def require_free(host: str, port: int) -> None:
    """Raise UserError if a server cannot listen at this address; names the next free port."""
    reason = _obstacle(host, port)
    if reason is None:
        return
    if reason == errno.EADDRINUSE:
        free = next((other for other in range(port + 1, min(port + TRIED, 65536)) if _obstacle(host, other) is None), None)
        remedy = f"; the next free one: --port {free}" if free else ""
        raise UserError(f"--port {port} is taken on {host}{remedy}")
    if reason == errno.EACCES:
        raise UserError(f"--port {port} is reserved for the system; choose one above 1023: --port {port + 5000}")
    raise UserError(f"--host {host} is not an address of this machine; choose 127.0.0.1 (this machine only) or 0.0.0.0 (all networks)")


def _obstacle(host: str, port: int) -> int | None:
    """Number of the error that prevents a server from listening there; None: there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore a server that has just ended
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return error.errno
    return None


def shown_host(host: str) -> str:
    """Host in the link: the machine's name if the server listens on all networks."""
    return socket.gethostname() if host in EVERYWHERE else f"[{host}]" if ":" in host else host


def environment(backend: str) -> dict[str, str]:
    """Environment of a server: disables jobs (which need a broker), telemetry, and warnings about MLflow's own code.

    It also contains the database's address, because a password would be more exposed in the list of processes.
    """
    return {
        "MLFLOW_BACKEND_STORE_URI": backend,
        "MLFLOW_REGISTRY_STORE_URI": backend,  # as by default, of which MLflow would print a line
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }


def names(host: str, port: int, *, scheme: str = "http") -> dict[str, str]:
    """Environment with which MLflow accepts requests to this machine's names and addresses; does not replace the user's settings.

    By default MLflow refuses names (against DNS rebinding), and lets only localhost's pages search runs (CORS).
    """
    if host in LOOPBACK:
        return {}
    addresses = [one.address.partition("%")[0] for ones in psutil.net_if_addrs().values() for one in ones if one.family in INTERNET]
    bracketed = [f"[{address}]" if ":" in address else address for address in addresses]
    known = list(dict.fromkeys(["localhost", shown_host(host), socket.gethostname(), socket.getfqdn(), *bracketed]))
    wanted = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": [*known, *(f"{name}:{port}" for name in known)],
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": [f"{scheme}://{name}:{port}" for name in known],
    }
    return {key: ",".join(values) for key, values in wanted.items() if key not in os.environ}


def serve(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    host: str,
    port: int,
    on_answer: Callable[[], None],
    folder: Path | None = None,
    tls: bool = False,
) -> None:
    """Run the server until it ends, or until an exception (Ctrl-C, SIGTERM), which also ends the server and its workers.

    Args:
        folder: working folder; files written there are readable only by the user.
        tls: whether it uses HTTPS.
        on_answer: called once, when the server answers.
    Raises:
        Failure: the server has ended with an error.
    """
    mask = -1 if folder is None else 0o077
    # In a session of its own, so that only this process handles Ctrl-C.
    process = subprocess.Popen(command, env=dict(environment), cwd=folder, umask=mask, start_new_session=True)
    try:
        while process.poll() is None and not _answers(host, port, tls=tls):
            time.sleep(0.1)
        if process.poll() is None:
            on_answer()
        if code := process.wait():
            raise Failure(f"MLflow's server has ended with code {code}; see its messages above")
    finally:
        end_session(process, grace=GRACE)


def _answers(host: str, port: int, *, tls: bool) -> bool:
    # Unverified, because it is our own process, whatever name its certificate has.
    options = {"context": ssl._create_unverified_context()} if tls else {}
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    connection = kind("localhost" if host in EVERYWHERE else host, port, timeout=2, **options)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
