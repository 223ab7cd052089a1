"""Opening of MLflow's store, by several processes at once; its failures never stop a training. Also names of tags, and the UI's table."""

from __future__ import annotations

import contextlib
import http
import importlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from advml.config.store import Place, prepare, sqlite_uri
from advml.core.errors import UserError
from advml.core.messages import one_line, tell
from advml.core.passwords import masked
from advml.core.signals import deferred

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

# Tags: MLflow's own, and those for weights, files and process of a run
PROCESS, DIGEST, MODEL, PARENT = "advml.process", "advml.digest", "advml.model_id", "advml.pretraining_run"
FLAGS, TRANSFER_FLAGS, RESULT = "advml.flags", "advml.transfer_flags", "advml.result"
NOTE, TABLES, COMMIT = "mlflow.note.content", "mlflow.loggedArtifacts", "mlflow.source.git.commit"
FOLDER = "advml.folder"  # host and folder of the study
NOW = "advml.now."  # prefix; current values of parameters that have changed since MLflow stored them, which cannot be overwritten
UI_MODE = "workflowType=machine_learning"  # part of links; without it the UI opens in its mode for language models

REPLACED = " (replaced)"  # end of the name of a run whose weights are no longer in the study's folder
LATER = "training goes on, `advml sync` adds the run later"
_broken: set[str] = set()  # failed stores, so that this process warns and waits once


class Denied(UserError):
    """A server rejects user name or password."""


@dataclass(frozen=True)
class Store:
    """Open store: client and experiment id."""

    client: MlflowClient
    experiment: str
    place: Place

    def find(self, *, run_id: str | None = None, **tags: str | None) -> Run | None:
        """Newest run of the experiment with this id, or with all of these `advml.` tags; runs deleted in the UI are ignored."""
        wanted = {"attributes.run_id": run_id} | {f"tags.`advml.{key}`": value for key, value in tags.items()}
        query = " and ".join(f"{key} = '{value}'" for key, value in wanted.items() if value is not None)
        found = self.client.search_runs([self.experiment], query, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0] if found else None


def warn_if_unusable(place: Place) -> None:
    """Warn in one line, before hours of work, if MLflow cannot write to the store or its server is down.

    Raises:
        Denied: a server does not take user or password.
    """
    try:
        if place.refused or place.is_server:
            connect(place)
    except Denied:
        raise
    except Exception as error:
        give_up(place, error)


def connect(place: Place) -> Store:
    """Open the store, creating missing tables and the experiment; raises any error."""
    if place.refused:
        raise UserError(place.refused)
    prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow uses deprecated functions of SQLAlchemy
        if place.database is None:
            return _open(place)
        from filelock import FileLock

        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # takes 2 s, hence before the lock
        place.database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place.database}.lock", timeout=60):  # seconds; creating the tables takes 2
            if not place.database.exists() or place.database.stat().st_size == 0:
                _create(place.database.resolve(), artifacts=place.artifacts.parent)
            return _open(place)


def _create(database: Path, *, artifacts: Path) -> None:
    """Create the tables in a temporary file and rename it, because a kill during MLflow's migrations would leave half a schema."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    fresh = database.with_name(f"{database.name}.new")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    SqlAlchemyStore(sqlite_uri(fresh), artifacts.as_uri()).engine.dispose()
    fresh.replace(database)


def _open(place: Place) -> Store:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if place.artifacts:  # databases: fail at once if there is no answer, whereas MLflow tries ten times, in 101 s
        import sqlalchemy

        sqlalchemy.inspect(sqlalchemy.create_engine(place.uri, poolclass=sqlalchemy.NullPool)).get_table_names()
    client = MlflowClient(tracking_uri=place.uri)
    try:
        experiment = client.get_experiment_by_name(place.experiment)
    except MlflowException as error:
        if error.get_http_status_code() != http.HTTPStatus.UNAUTHORIZED:
            raise
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise Denied(f"MLflow at {masked(place.uri)} refuses user or password, or was given none; {remedy}") from None
    if experiment is not None and place.database:
        experiment = _of_this_folder(client, experiment, place)
    if experiment is None:
        try:
            client.create_experiment(place.experiment, artifact_location=place.artifacts and place.artifacts.as_uri())
        except MlflowException as error:  # another process may have created it on the server, which cannot be locked
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(place.experiment)
        save_view(client, experiment.experiment_id)
    if experiment.lifecycle_stage == "deleted":  # deleted in the UI, and needed again
        client.restore_experiment(experiment.experiment_id)
    return Store(client, experiment.experiment_id, place)


def _of_this_folder(client: MlflowClient, experiment: Experiment, place: Place) -> Experiment | None:
    """Return the experiment; if the project was moved or copied, the one created in this folder, if any.

    MLflow stores absolute paths of artifacts and never changes them: runs would write into the other folder. Its experiment is put aside
    under that folder's name. Artifacts in a place that the user chose stay there.
    """
    old, new = Path(unquote(urlparse(experiment.artifact_location).path)), place.artifacts
    if old == new or old.parts[-2:] != new.parts[-2:] or not experiment.artifact_location.startswith(("file:", "/")):
        return experiment
    aside, here = (f"{place.experiment} of {folder.parents[1]}"[-500:] for folder in (old, new))  # MLflow's longest name
    client.rename_experiment(experiment.experiment_id, aside)
    tell(f"note: runs logged in {old.parents[1]} are in the experiment {aside!r} now; to rebuild them here, from files: advml sync")
    if back := client.get_experiment_by_name(here):
        client.rename_experiment(back.experiment_id, place.experiment)
    return back


def attempt(place: Place, action: Callable[[], Any], *, then: str = LATER) -> Any:
    """Return `action()`; if the store fails, None after one warning line that ends with the consequence `then`."""
    done = None
    try:
        if place.uri not in _broken:
            with deferred():
                done = action()
    except Exception as error:
        give_up(place, error, then=then)
    except BaseException as error:  # a signal that arrived during the action: the run is ended as well
        if isinstance(done, contextlib.AbstractContextManager):
            with contextlib.suppress(Exception):
                done.__exit__(type(error), error, None)
        raise
    return done


def give_up(place: Place, error: Exception, *, then: str = LATER) -> None:
    """Print one warning line per store, the first time only; `then` is the consequence."""
    if place.uri not in _broken:
        _broken.add(place.uri)
        tell(f"warning: no tracking, {explain(place, error)}; {then}")


def explain(place: Place, error: Exception) -> str:
    """Describe store and error in one line without passwords."""
    if isinstance(error, UserError):  # it names the setting
        return masked(str(error))
    return f"{masked(place.uri)}: {one_line(str(error).strip() or type(error).__name__, longest=200)}"


# Columns of the UI's table of runs, saved with the experiment, because the default table shows neither metrics nor parameters. `advml ui`
# links to this view; in plain `mlflow ui` it is in the menu Views of the experiment's runs.

VIEW_KEY = "results"
VIEW = f"mlflow.sharedViewState.{VIEW_KEY}"  # tag of the experiment, as set by the UI's menu
# Column -> width in pixels.
COLUMNS = {
    "attributes.`Duration`": 90,
    "metrics.`accuracy/clean`": 130,
    "metrics.`accuracy/threat_model_2`": 200,
    "metrics.`accuracy/worst_case`": 170,
    f"tags.`{FLAGS}`": 130,
    "params.`scheme`": 90,
    "params.`regime`": 100,
    "params.`seed`": 70,
    "params.`epsilon`": 90,
}
ABOUT = (
    "Models and results of [advml](https://arxiv.org/abs/2302.02502). Figures: runs, then the menu **Views**, **Results**. "
    "Report: in the run `study ...`. To compare models: tick them, then **Compare**."
)


def save_view(client: MlflowClient, experiment: str) -> None:
    """Save view and description with the experiment once; later changes by users are kept."""
    tags = client.get_experiment(experiment).tags
    if VIEW not in tags:
        state = {"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS, "runsHiddenMode": "SHOW_ALL"}
        state |= {"orderByKey": "metrics.`accuracy/worst_case`", "orderByAsc": False}
        now = int(time.time() * 1000)
        view = {"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
        client.set_experiment_tag(experiment, VIEW, json.dumps(view))
    if NOTE not in tags:
        client.set_experiment_tag(experiment, NOTE, ABOUT)
