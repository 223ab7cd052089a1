"""MLflow's UI: the link to this study's table of results, and a local server for it."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import signal
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
from advml.tracking import store as stores

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # addresses to bind to, of all networks of the machine
INTERNET = (socket.AF_INET, socket.AF_INET6)
TRIED = 100  # ports after the one asked for
VIEW = "mlflow.sharedViewState.results"  # tag of the experiment, as the UI's own menu "Views" sets it
# By itself the table shows neither metrics nor tags. Column -> width in pixels.
COLUMNS = {
    "attributes.`Duration`": 90,
    "metrics.`accuracy/clean`": 150,
    "metrics.`accuracy/threat_model_1`": 220,
    "metrics.`accuracy/threat_model_2`": 220,
    "metrics.`accuracy/worst_case`": 190,
    "metrics.`diagnostics/flags`": 150,
    "tags.`advml.scheme`": 120,
    "tags.`advml.regime`": 120,
}


def link(place: Place, *, host: str = "127.0.0.1", port: int = 5000) -> str:
    """The address of the experiment's table of results in the UI: a local one on `host` and `port`, or the tracking server's.

    Raises:
        UserError: MLflow writes nothing to the store that is configured, or the server does not take user or password.
        Failure: the store is a local one, and cannot be opened.
    """
    base = masked(re.sub(r"//\S*@", "//", place.uri)).rstrip("/") if place.is_server else f"http://{shown_host(host)}:{port}"
    try:
        store = stores.connect(place)
        _save_view(store)
    except UserError:
        raise
    except Exception as error:
        if not place.is_server:
            raise Failure(f"{stores.explain(place, error)}; mend the store or name another with -S tracking.uri=...") from error
        stores.give_up(place, error, then="the link is that of the server, not of the experiment")
        return base
    return f"{base}/#/experiments/{store.experiment}/runs?viewStateShareKey={VIEW.rpartition('.')[2]}&{stores.UI_MODE}"


def _save_view(store: stores.Store) -> None:
    """Save the columns of the table with the experiment; the user's changes to them stay."""
    if VIEW not in store.client.get_experiment(store.experiment).tags:
        state = {"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS, "runsHiddenMode": "SHOW_ALL"}
        now = int(time.time() * 1000)
        view = {"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
        store.client.set_experiment_tag(store.experiment, VIEW, json.dumps(view))


def command(place: Place, *, host: str = "127.0.0.1", port: int = 5000) -> tuple[list[str], dict[str, str]] | None:
    """Command and environment of a local UI on the store that `link` links to; None where a server has one of its own.

    Raises:
        UserError: MLflow writes nothing to the store that is configured.
    """
    if place.refused:
        raise UserError(place.refused)
    if place.is_server:
        return None
    arguments = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", host, "--port", str(port)]
    return arguments, {**os.environ, **environment(place.uri), **names(host, port)}


def require_free(host: str, port: int) -> None:
    """Raises UserError if nothing can listen at this address, naming the next port that is free."""
    reason = _obstacle(host, port)
    if reason is None:
        return
    if reason == errno.EADDRINUSE:
        free = next((other for other in range(port + 1, min(port + TRIED, 65536)) if _obstacle(host, other) is None), None)
        remedy = f"; the next free one: --port {free}" if free else ""
        raise UserError(f"--port {port} is taken on {host}{remedy}")
    if reason == errno.EACCES:
        raise UserError(f"--port {port} is reserved for the system; choose one above 1023: --port {port + 5000}")
    raise UserError(f"--host {host} is no address of this machine; choose 127.0.0.1 (this machine only) or 0.0.0.0 (all networks)")


def _obstacle(host: str, port: int) -> int | None:
    """The number of the error that keeps a server from listening there; None: nothing does."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no obstacle
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return error.errno
    return None


def shown_host(host: str) -> str:
    """The host in the link: the machine's name where the server listens on all of its networks."""
    return socket.gethostname() if host in EVERYWHERE else f"[{host}]" if ":" in host else host


def environment(backend: str) -> dict[str, str]:
    """Settings of every server that we start: no jobs, which want a broker, no reports to MLflow's makers, no warnings about its code.

    The database is named here, where its password is less exposed than in a list of processes.
    """
    return {
        "MLFLOW_BACKEND_STORE_URI": backend,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }


def names(host: str, port: int, *, scheme: str = "http") -> dict[str, str]:
    """Environment under which MLflow serves browsers that call this machine by its names and addresses; the user's own settings win.

    By itself MLflow refuses names (DNS rebinding), and lets no page but localhost's search runs (CORS).
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
    """Run the server until it ends or an exception (Ctrl-C, SIGTERM) ends this process; the server and its workers end with it.

    Args:
        folder: where it runs; what it writes there, only the user can read.
        tls: whether it speaks HTTPS.
        on_answer: called once, when the server answers.
    Raises:
        Failure: the server has ended with an error.
    """
    mask = -1 if folder is None else 0o077
    # In a session of its own: a Ctrl-C in the terminal is ours to handle.
    process = subprocess.Popen(command, env=dict(environment), cwd=folder, umask=mask, start_new_session=True)
    try:
        while process.poll() is None and not _answers(host, port, tls=tls):
            time.sleep(0.1)
        if process.poll() is None:
            on_answer()
        if code := process.wait():
            raise Failure(f"MLflow's server has ended with code {code}; it says why above")
    finally:
        _end(process)


def _answers(host: str, port: int, *, tls: bool) -> bool:
    options = {"context": ssl._create_unverified_context()} if tls else {}  # it is our own process, whatever name its certificate has
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    connection = kind("localhost" if host in EVERYWHERE else host, port, timeout=2, **options)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server and its workers, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
