"""Where MLflow's history is kept, and how its client is set: what params.yaml, the environment or the defaults say."""

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


@dataclass(frozen=True)
class Place:
    """Where the history of the study in `root` is kept."""

    uri: str
    experiment: str
    root: Path
    database: Path | None = None  # SQLite only
    artifacts: Path | None = None  # None: a server decides
    refused: str | None = None  # why MLflow writes nothing there, and what to do

    @property
    def is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))


def locate(tracking: Tracking, *, root: Path) -> Place:
    """The store that params.yaml, the environment or the default names; relative paths start at the root, in a DVC stage at DVC_ROOT."""
    root = Path(root).resolve()
    base = Path(os.environ.get("DVC_ROOT") or root).resolve()  # a queue worker's own folder is temporary
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
    """The address of a database file; SQLAlchemy unquotes the path and takes what follows a question mark for options."""
    return "sqlite:///" + database.as_posix().replace("%", "%25").replace("?", "%3F")


def _refused(uri: str, setting: str, remedy: str) -> str | None:
    """Folders of files, as MLflow kept its runs in before it had databases: it reads and writes none by now."""
    scheme, colon, path = uri.partition(":")
    is_folder = scheme == "file" if colon else not uri.startswith(("databricks", "uc"))
    if not is_folder or os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    move = f"mlflow migrate-filestore --source {shlex.quote(path.removeprefix('//') if colon else uri)} --target {DEFAULT_URI}"
    why = f"{setting} is a folder, and MLflow keeps runs in databases only"
    return f"{why}; {remedy} (they go to {DEFAULT_URI} then); for its old runs: {move}"


def prepare() -> None:
    """Set MLflow's environment; best before mlflow is imported, which reads some of it only then."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every retry
