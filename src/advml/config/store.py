"""Location of MLflow's store, from params.yaml, the environment or the default, and settings of its client."""

from __future__ import annotations

import logging
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from advml.config.schema import Tracking
from advml.core.passwords import remember

DEFAULT_URI = "sqlite:///mlflow.db"
# Environment variables for MLflow, unless the user has set them. The first ones make a dead server cost seconds (MLflow's defaults are
# 120 s per attempt and 7 retries); the last four keep MLflow off stdout, stderr and the internet.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class Place:
    """MLflow store of the study in `root`."""

    uri: str
    experiment: str
    root: Path
    database: Path | None = None  # SQLite only
    artifacts: Path | None = None  # None: a server decides
    refused: str | None = None  # why MLflow cannot use this store, with the remedy

    @property
    def is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))


def locate(tracking: Tracking, *, root: Path) -> Place:
    """Store named by params.yaml, the environment or the default; relative paths start at the root, in a DVC stage at DVC_ROOT."""
    root = Path(root).resolve()
    base = Path(os.environ.get("DVC_ROOT") or root).resolve()  # because a queue worker runs in a temporary folder
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    remember(uri)
    experiment = tracking.experiment
    folder = Path("mlruns", re.sub(r"[^\w.-]+", "_", experiment))
    if uri.startswith("sqlite:///"):
        database = base / unquote(uri.removeprefix("sqlite:///").partition("?")[0])
        return Place(sqlite_uri(database), experiment, root, database, database.parent / folder)
    where, remedy = ("tracking.uri", "set it to null") if tracking.uri else ("MLFLOW_TRACKING_URI", "unset it")
    artifacts = base / folder if "sql" in uri.partition(":")[0] else None
    return Place(uri, experiment, root, None, artifacts, _refused(uri, f"{where} = {uri}", remedy))


def sqlite_uri(database: Path) -> str:
    """SQLAlchemy address of a database file, with the path quoted (SQLAlchemy unquotes it, and reads options after a question mark)."""
    return "sqlite:///" + database.as_posix().replace("%", "%25").replace("?", "%3F")


def _refused(uri: str, setting: str, remedy: str) -> str | None:
    """Error for an address that is a folder: current MLflow no longer supports its old file store; None for other addresses."""
    scheme, colon, path = uri.partition(":")
    is_folder = scheme == "file" if colon else not uri.startswith(("databricks", "uc"))
    if not is_folder or os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    move = f"mlflow migrate-filestore --source {shlex.quote(path.removeprefix('//') if colon else uri)} --target {DEFAULT_URI}"
    why = f"{setting} is a folder, and MLflow keeps runs in databases only"
    return f"{why}; {remedy} (they go to {DEFAULT_URI} then); for its old runs: {move}"


def prepare() -> None:
    """Set MLflow's environment variables; call before mlflow is imported, which reads some of them only then."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every retry
