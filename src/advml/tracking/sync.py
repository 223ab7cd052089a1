"""Runs rebuilt from files, or brought up to date with them: after `dvc pull`, a run-cache hit or an outage MLflow lags behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.errors import Failure, UserError
from advml.paths import Workspace
from advml.runtime.processes import is_orphaned
from advml.tracking import store as stores
from advml.tracking.evaluations import log_evaluation
from advml.tracking.files import read
from advml.tracking.representations import log_representation
from advml.tracking.results import complete, log_transfer, results
from advml.tracking.run import Run
from advml.tracking.runs import search
from advml.tracking.start import PROCESS, DataInfo, Facts, origin, start
from advml.tracking.training import log_training, written

if TYPE_CHECKING:
    from advml.config import Config


def sync(config: Config, *, root: Path) -> list[str]:
    """Make the store complete: a run for every trained model and for every result in `reports/`, with all that the stages log.

    A run is missing when none carries the name and the sha256 of a folder's weights, or of a result's files. What has been added to
    the run of a model (curves, evaluation, representation) is compared by the sha256 of all its files, and logged anew where one
    differs. Running this twice changes nothing the second time. Runs whose process on this machine is gone are ended too.

    Returns:
        The names of the runs created or brought up to date.
    Raises:
        UserError: MLflow cannot write where it is told to.
        Failure: if the store cannot be opened or written to, or a file is no valid JSON.
    """
    place, workspace = stores.locate(config, root=root), Workspace(Path(root).resolve())
    changed = []
    try:
        store = stores.connect(place)
        for folder in _trained(workspace):
            run, is_new = _find_or_import(place, store, workspace, folder)
            updated = _add_report(run, workspace, folder)
            changed += [run.name] if is_new or updated else []
        _end_orphans(store)
        changed += [found.name for found in results(workspace) if complete(place, store, found, root=workspace.root, synced=True)]
    except (Failure, UserError):
        raise
    except Exception as error:
        raise Failure(f"{stores.explain(place, error)}; mend the store or name another with -S tracking.uri=...") from error
    return changed


def attach_run(config: Config, *, root: Path, folder: Path) -> Run:
    """The run of the trained model in `folder`, to add results to; rebuilt from the files if the store lacks it.

    Its status stays as it is. Never raises for the store's sake: without one the run does nothing.
    """
    place, workspace = stores.locate(config, root=root), Workspace(Path(root).resolve())

    def attach(store: stores.Store) -> Run:
        run, _ = _find_or_import(place, store, workspace, folder)
        return Run(place, store, store.client.get_run(run.id), root=workspace.root, attached=True)

    return stores.attempt(place, attach) or Run(place, None, None, root=workspace.root, attached=True)


def _trained(workspace: Workspace) -> list[Path]:
    """The folders of trained models, pretraining first, so that models find the runs they link to."""
    found = [*workspace.pretrained("").glob("*/model.json"), *workspace.models.glob("*/model.json")]
    return [path.parent for path in sorted(found, key=lambda path: (path.parent.parent.name != "pretrain", path))]


def _find_or_import(place: stores.Place, store: stores.Store, workspace: Workspace, folder: Path) -> tuple[Run, bool]:
    facts = read(folder / "model.json", needs=("name", "kind", "digest", "parameters", "data"))
    record = search(store, name=facts["name"], digest=facts["digest"], kind=facts["kind"])
    if record is None:
        return _import(place, store, workspace, folder, facts), True
    run = Run(place, store, record, root=workspace.root, attached=True, strict=True)
    _link(run, store, facts)
    return run, False


def _import(place: stores.Place, store: stores.Store, workspace: Workspace, folder: Path, facts: dict[str, Any]) -> Run:
    """Write what the stage would have written while it ran; the file's own time stands in for the clock."""
    tags = {key: facts[key] for key in ("scheme", "phase", "regime", "seed") if key in facts}
    tags |= {"synced": "true"} | origin(facts)
    params = facts["parameters"] | {"versions": facts.get("versions", {})}
    known = Facts(facts["name"], facts["kind"], tags, params, DataInfo(*(facts["data"][key] for key in ("digest", "source", "counts"))))
    when = written(folder / "model.json")
    record = start(store, known, root=workspace.root, start_time=when)
    with Run(place, store, record, root=workspace.root, strict=True) as run:
        _link(run, store, facts)
        log_training(run, workspace, folder)
        run.log_checkpoint(folder, digest=facts["digest"])
        run.finish("FINISHED", end_time=when)
    return run


def _link(run: Run, store: stores.Store, facts: dict[str, Any]) -> None:
    """Link the pretraining, unless the run has been linked; its own run may have come later."""
    if facts.get("pretraining") and run.tag("advml.pretraining_run") is None:
        parent = search(store, kind="pretrain", name=facts["pretraining"]["name"], digest=facts["pretraining"]["digest"])
        run.link(parent.info.run_id if parent else None)


def _add_report(run: Run, workspace: Workspace, folder: Path) -> bool:
    """Log what the run lacks of the files beside it, which were pulled, or made while the store was down; False: nothing."""
    logged = log_training(run, workspace, folder)
    return any([logged, *(log(run, workspace, folder.name) for log in (log_evaluation, log_representation, log_transfer))])


def _end_orphans(store: stores.Store) -> None:
    """A process killed outright leaves its run RUNNING; one that had recorded its weights had finished."""
    for record in store.client.search_runs([store.experiment], "attributes.status = 'RUNNING'", max_results=1000):
        tags = record.data.tags
        if is_orphaned(tags.get(PROCESS, "")):
            had_finished = "advml.digest" in tags and tags.get("advml.kind") != "search"  # a search goes on after its results
            store.client.set_terminated(record.info.run_id, "FINISHED" if had_finished else "KILLED")
