"""Runs rebuilt from files, or brought up to date with them: after `dvc pull`, a run-cache hit or an outage MLflow lags behind."""

from __future__ import annotations

from pathlib import Path

from advml.core.errors import Failure, UserError
from advml.core.io import modified, read_json
from advml.core.paths import Workspace
from advml.core.processes import has_ended
from advml.tracking import store as stores
from advml.tracking.names import DIGEST, PROCESS
from advml.tracking.registry import register_best
from advml.tracking.results import REMEDY, comparison, complete, log_model, log_parts, results
from advml.tracking.run import Run


def sync(place: stores.Place) -> list[str]:
    """Make the store complete: a run for every trained model and for every result in `reports/`, with all that the stages log.

    Runs are known by the name and the sha256 of a folder's weights, or of a result's files; what belongs to a model's run, by the sha256
    of its files. A second time, nothing changes. Runs whose process on this machine is gone are ended too.

    Returns:
        The names of the runs created or brought up to date.
    Raises:
        UserError, Failure: a file is damaged; the store cannot be opened or written to.
    """
    workspace = Workspace(place.root)
    # Pretraining first, so that models find the runs they link to.
    folders = [path.parent for stage in (workspace.pretrained(""), workspace.models) for path in sorted(stage.glob("*/model.json"))]
    try:
        store = stores.connect(place)
        changed = [folder.name for folder in folders if _log_folder(store, folder)]
        _end_orphans(store)
        changed += [one.name for one in results(workspace) if complete(store, one, rebuilt=True)]
        register_best(store)
        return changed
    except (Failure, UserError):
        raise
    except Exception as error:
        raise Failure(f"{stores.explain(place, error)}; mend the store or name another with -S tracking.uri=...") from error


def log_folder(place: stores.Place, folder: Path) -> None:
    """Log what a stage has just written about the trained model in `folder`: `sync`, of this one. Never raises for the store's sake."""
    stores.attempt(place, lambda store: _log_folder(store, folder))


def log_result(place: stores.Place, what: str | Path) -> None:
    """Make the run of what a stage has just written: `study`, `transfer`, the name of a given model, or the folder of a comparison."""
    chosen = [comparison(what)] if isinstance(what, Path) else [one for one in results(Workspace(place.root)) if one.name == what]
    stores.attempt(place, lambda store: [complete(store, one) for one in chosen])
    if what == "study":
        stores.attempt(place, register_best)


def _log_folder(store: stores.Store, folder: Path) -> bool:
    """Bring the run of a model up to date, or make it; the file's own time stands in for the clock. False: nothing was to be done."""
    record = read_json(folder / "model.json", needs=("name", "kind", "digest", "parameters", "data"), remedy=f"{REMEDY} {folder}")
    if found := store.find(name=record["name"], digest=record["digest"], kind=record["kind"]):
        run = Run(store, found, strict=True)
        run.link(record.get("pretraining"))  # its own run may have come later
        return any([log_model(run, folder, digest=record["digest"]), log_parts(run, folder)])
    with Run.begin(store, record, written=modified(folder / "model.json")) as run:
        log_model(run, folder, digest=record["digest"])
        log_parts(run, folder)
    return True


def _end_orphans(store: stores.Store) -> None:
    """A process killed outright leaves its run RUNNING; one that had recorded its weights had finished."""
    for found in store.client.search_runs([store.experiment], "attributes.status = 'RUNNING'", max_results=1000):
        if has_ended((tags := found.data.tags).get(PROCESS, "")):
            had_finished = DIGEST in tags and tags.get("advml.kind") != "search"  # a search goes on after its results
            store.client.set_terminated(found.info.run_id, "FINISHED" if had_finished else "KILLED")
