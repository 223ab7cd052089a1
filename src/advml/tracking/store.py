"""Where the history lies, and how it is opened: safely by many processes, and never at training's cost."""

from __future__ import annotations

import http
import logging
import os
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from advml.errors import UserError
from advml.lines import one_line, tell
from advml.passwords import masked, remember
from advml.tracking import sqlite, ui
from advml.tracking.signals import deferred

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

    from advml.config import Config

T = TypeVar("T")
# A dead server must cost seconds: MLflow's own settings make it 120 s per attempt and 7 retries.
# The user's own settings win. The last four keep MLflow off stdout, stderr and the internet.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
DEFAULT_URI = "sqlite:///mlflow.db"
LOCK_TIMEOUT = 60  # seconds; creating the tables takes 2, and other processes may wait in line
_broken: set[str] = set()  # the stores that this process has given up, so that it warns and waits once


class Denied(UserError):
    """A server does not take the user's name or password."""


@dataclass(frozen=True)
class Place:
    """Where an experiment's history lies.

    Attributes:
        database: sqlite only.
        artifacts: None where a server decides.
        refused: why MLflow writes nothing there, and what to do; None: it may.
    """

    uri: str
    experiment: str
    database: Path | None
    artifacts: Path | None
    refused: str | None = None

    @property
    def is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Store:
    """An open store: the client and the id of the experiment."""

    client: MlflowClient
    experiment: str


def locate(config: Config, *, root: Path) -> Place:
    """The place that params.yaml, the environment or the default names; relative paths start at the root."""
    base = Path(os.environ.get("DVC_ROOT") or root).resolve()
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    remember(uri)
    experiment = config.tracking.experiment
    folder = Path("mlruns", re.sub(r"[^\w.-]+", "_", experiment))
    if not uri.startswith("sqlite:///"):
        where, remedy = ("tracking.uri", "set it to null") if config.tracking.uri else ("MLFLOW_TRACKING_URI", "unset it")
        refused = _refused(uri, f"{where} = {uri}", remedy)
        return Place(uri, experiment, None, base / folder if "sql" in uri.partition(":")[0] else None, refused)
    database = base / unquote(uri.removeprefix("sqlite:///").partition("?")[0])
    return Place(sqlite.uri(database), experiment, database, database.parent / folder)


def _refused(uri: str, setting: str, remedy: str) -> str | None:
    """Folders of files, as MLflow kept its runs in before it had databases: it reads and writes none by now."""
    scheme, colon, path = uri.partition(":")
    is_folder = scheme == "file" if colon else not uri.startswith(("databricks", "uc"))
    if not is_folder or os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    source = path.removeprefix("//") if colon else uri
    move = f"mlflow migrate-filestore --source {shlex.quote(source)} --target {DEFAULT_URI}"
    why = f"{setting} is a folder, and MLflow keeps runs in databases only"
    return f"{why}; {remedy} (they go to {DEFAULT_URI} then); for its old runs: {move}"


def require_usable(config: Config, *, root: Path) -> None:
    """Raises UserError if MLflow cannot write where params.yaml or the environment say; nothing is opened."""
    if refused := locate(config, root=root).refused:
        raise UserError(refused)


def warn_if_unusable(config: Config, *, root: Path) -> None:
    """One line for what `require_usable` refuses, and for a server that is down, before hours of work.

    Raises:
        Denied: a server does not take user or password.
    """
    place = locate(config, root=root)
    try:
        if place.refused or place.is_server:
            connect(place)
    except Denied:
        raise
    except Exception as error:
        give_up(place, error)


def prepare() -> None:
    """Set MLflow's environment; best before mlflow is imported, which reads some of it only then."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every retry


def connect(place: Place) -> Store:
    """Open the store, creating tables and experiment where they are absent; raises whatever goes wrong."""
    if place.refused:
        raise UserError(place.refused)
    prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's models use what SQLAlchemy deprecates
        if place.database is None:
            return _open(place)
        from filelock import FileLock
        from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  (2 s that processes need not wait for in line)

        place.database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place.database}.lock", timeout=LOCK_TIMEOUT):
            if not place.database.exists() or place.database.stat().st_size == 0:
                sqlite.create(place.database, artifacts=place.artifacts)
            sqlite.mend(place.database, experiment=place.experiment, artifacts=place.artifacts)
            return _open(place)


def attempt(place: Place, action: Callable[[Store], T]) -> T | None:
    """`action(store)`; None, and one warning line, where the store does not work."""
    if place.uri in _broken:
        return None
    try:
        with deferred():
            return action(connect(place))
    except Exception as error:
        give_up(place, error)
        return None


def give_up(place: Place, error: Exception, *, then: str = "training goes on, `advml sync` adds the run later") -> None:
    """One warning line for this store, the first time only; `then` says what comes of it."""
    if place.uri not in _broken:
        _broken.add(place.uri)
        tell(f"warning: no tracking, {explain(place, error)}; {then}")


def explain(place: Place, error: Exception) -> str:
    """The store and what is wrong with it, in one line without passwords."""
    if isinstance(error, UserError):  # ours: it names the setting
        return masked(str(error))
    return f"{masked(place.uri)}: {one_line(str(error).strip() or type(error).__name__, longest=200)}"


def _open(place: Place) -> Store:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if not place.is_server:
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # else a database that is down costs 102 s of retries
    client = MlflowClient(tracking_uri=place.uri)
    try:
        experiment = client.get_experiment_by_name(place.experiment) or _create_experiment(client, place)
    except MlflowException as error:
        if error.get_http_status_code() != http.HTTPStatus.UNAUTHORIZED:
            raise
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise Denied(f"MLflow at {masked(place.uri)} refuses user or password, or was given none; {remedy}") from None
    if experiment.lifecycle_stage == "deleted":  # thrown away in the UI; a new run wants it back
        client.restore_experiment(experiment.experiment_id)
    ui.ensure_view(client, experiment)
    return Store(client, experiment.experiment_id)


def _create_experiment(client: MlflowClient, place: Place) -> Experiment:
    try:
        client.create_experiment(place.experiment, artifact_location=place.artifacts.as_uri() if place.artifacts else None)
    except Exception:  # on a server, which we cannot lock, another process may have been faster
        if client.get_experiment_by_name(place.experiment) is None:
            raise
    return client.get_experiment_by_name(place.experiment)
