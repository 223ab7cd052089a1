"""Where MLflow's history is kept, and how it is opened: by many processes at once, and never at training's cost."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlparse

from advml.config import Config
from advml.errors import UserError
from advml.lines import one_line, tell
from advml.passwords import masked, remember
from advml.runtime.signals import deferred

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities import Run as Entity

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
UI_MODE = "workflowType=machine_learning"  # else the UI opens in its mode for language models
_broken: set[str] = set()  # the stores that this process has given up, so that it warns and waits once


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


@dataclass(frozen=True)
class Store:
    """An open store: the client and the id of the experiment."""

    client: MlflowClient
    experiment: str
    place: Place

    def find(self, *, run_id: str | None = None, **tags: str | None) -> Entity | None:
        """The newest run of the experiment with this id, or with all of these `advml.` tags; runs deleted in the UI do not count."""
        wanted = {"attributes.run_id": run_id} | {f"tags.`advml.{key}`": value for key, value in tags.items()}
        query = " and ".join(f"{key} = '{value}'" for key, value in wanted.items() if value is not None)
        found = self.client.search_runs([self.experiment], query, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0] if found else None


def locate(config: Config, *, root: Path) -> Place:
    """The place that params.yaml, the environment or the default names; relative paths start at the root, in a DVC stage at DVC_ROOT."""
    root = Path(root).resolve()
    base = Path(os.environ.get("DVC_ROOT") or root).resolve()  # a queue worker's own folder is temporary
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    remember(uri)
    experiment = config.tracking.experiment
    folder = Path("mlruns", re.sub(r"[^\w.-]+", "_", experiment))
    if uri.startswith("sqlite:///"):
        database = base / unquote(uri.removeprefix("sqlite:///").partition("?")[0])
        return Place(sqlite_uri(database), experiment, root, database, database.parent / folder)
    where, remedy = ("tracking.uri", "set it to null") if config.tracking.uri else ("MLFLOW_TRACKING_URI", "unset it")
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


def warn_if_unusable(config: Config, *, root: Path) -> None:
    """One line for a store that MLflow does not write to, before hours of work whose stages would say it in their logs."""
    if (place := locate(config, root=root)).refused:
        give_up(place, UserError(place.refused))


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

        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # 2 s, for which other processes need not wait in line
        place.database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place.database}.lock", timeout=LOCK_TIMEOUT):
            if not place.database.exists() or place.database.stat().st_size == 0:
                _create(place.database.resolve(), artifacts=place.artifacts.parent)
            return _open(place)


def _create(database: Path, *, artifacts: Path) -> None:
    """Make the tables in a file beside, then rename it: MLflow's migrations are no transaction, and a kill would leave half a schema."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    fresh = database.with_name(f"{database.name}.new")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    SqlAlchemyStore(sqlite_uri(fresh), artifacts.as_uri()).engine.dispose()
    fresh.replace(database)


def _open(place: Place) -> Store:
    from mlflow import MlflowClient

    if place.artifacts:  # a database, which raises at once if it does not answer: MLflow itself tries ten times, in 101 s
        import sqlalchemy

        sqlalchemy.inspect(sqlalchemy.create_engine(place.uri, poolclass=sqlalchemy.NullPool)).get_table_names()
    client = MlflowClient(tracking_uri=place.uri)
    experiment = client.get_experiment_by_name(place.experiment)
    if experiment is not None and place.database:
        experiment = _of_this_folder(client, experiment, place)
    experiment = experiment or _create_experiment(client, place)
    if experiment.lifecycle_stage == "deleted":  # thrown away in the UI; a new run wants it back
        client.restore_experiment(experiment.experiment_id)
    return Store(client, experiment.experiment_id, place)


def _of_this_folder(client: MlflowClient, experiment: Experiment, place: Place) -> Experiment | None:
    """The experiment, unless the project has been moved or copied since: then the one that was made in this folder, if there is one.

    MLflow stores the absolute paths of artifacts and never changes them: runs would write into the other folder. Its experiment is put
    aside under that folder's name. Artifacts in a place that the user chose stay there.
    """
    old, new = Path(unquote(urlparse(experiment.artifact_location).path)), place.artifacts
    if old == new or old.parts[-2:] != new.parts[-2:] or not experiment.artifact_location.startswith(("file:", "/")):
        return experiment
    aside, here = (f"{place.experiment} of {folder.parents[1]}"[-500:] for folder in (old, new))  # the longest name that MLflow takes
    client.rename_experiment(experiment.experiment_id, aside)
    tell(f"note: runs logged in {old.parents[1]} are in the experiment {aside!r} now; to rebuild them here, from files: advml sync")
    if back := client.get_experiment_by_name(here):
        client.rename_experiment(back.experiment_id, place.experiment)
    return back


def _create_experiment(client: MlflowClient, place: Place) -> Experiment:
    try:
        client.create_experiment(place.experiment, artifact_location=place.artifacts and place.artifacts.as_uri())
    except Exception:  # on a server, which we cannot lock, another process may have been faster
        if client.get_experiment_by_name(place.experiment) is None:
            raise
    return client.get_experiment_by_name(place.experiment)


def attempt(place: Place, action: Callable[[Store], T]) -> T | None:
    """`action(store)`; None, and one warning line, where the store does not work."""
    done = None
    try:
        if place.uri not in _broken:
            with deferred():
                done = action(connect(place))
    except Exception as error:
        give_up(place, error)
    except BaseException as error:  # a signal, which has waited for the action: the run that it has begun is ended as well
        if isinstance(done, contextlib.AbstractContextManager):
            done.__exit__(type(error), error, None)
        raise
    return done


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
