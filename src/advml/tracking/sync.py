"""Runs rebuilt from files: after `dvc pull`, a run-cache hit or an outage there are results without history."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.errors import Failure
from advml.paths import Workspace
from advml.tracking import store as stores
from advml.tracking.evaluations import log_evaluation
from advml.tracking.representations import log_representation
from advml.tracking.run import Run
from advml.tracking.runs import search
from advml.tracking.start import PROCESS, DataInfo, Facts, start

if TYPE_CHECKING:
    from advml.config import Config


def sync(config: Config, *, root: Path) -> list[str]:
    """Make the store complete: a run for every trained model, and final metrics on every run.

    A run is missing when none carries the name and the weights' sha256 of a folder in `models/`. Running this
    twice creates nothing the second time. Runs whose process on this machine is gone are ended too.

    Returns:
        The names of the runs created.
    Raises:
        Failure: if the store cannot be opened or written to, or a file is no valid JSON.
    """
    place, workspace = stores.locate(config, root=root), Workspace(Path(root).resolve())
    created = []
    try:
        store = stores.connect(place)
        for folder in _trained(workspace):
            run, is_new = _find_or_import(place, store, workspace, folder)
            created += [run.name] if is_new else []
            _add_report(run, workspace, folder.name)
        _end_orphans(store)
    except Failure:
        raise
    except Exception as error:
        raise Failure(f"{stores.explain(place, error)}; mend the store or name another with -S tracking.uri=...") from error
    return created


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
    facts = _read(folder / "model.json", needs=("name", "kind", "digest", "parameters", "data"))
    record = search(store, name=facts["name"], digest=facts["digest"], kind=facts["kind"])
    if record is not None:
        return Run(place, store, record, root=workspace.root, attached=True, strict=True), False
    return _import(place, store, workspace, folder, facts), True


def _import(place: stores.Place, store: stores.Store, workspace: Workspace, folder: Path, facts: dict[str, Any]) -> Run:
    """Write what the stage would have written while it ran; the file's own time stands in for the clock."""
    tags = {key: facts[key] for key in ("scheme", "phase", "regime", "seed") if key in facts}
    tags |= {"synced": "true", "mlflow.source.git.commit": facts.get("git_commit")}
    params = facts["parameters"] | {"versions": facts.get("versions", {})}
    known = Facts(facts["name"], facts["kind"], tags, params, DataInfo(*(facts["data"][key] for key in ("digest", "source", "counts"))))
    written = int(1000 * (folder / "model.json").stat().st_mtime)
    record = start(store, known, root=workspace.root, start_time=written)
    with Run(place, store, record, root=workspace.root, strict=True) as run:
        curves = workspace.report(facts["name"]) / "history.json"
        run.log_epochs(_read(curves) if curves.exists() else [], at=written)
        if facts.get("pretraining"):
            parent = search(store, kind="pretrain", name=facts["pretraining"]["name"], digest=facts["pretraining"]["digest"])
            run.link(parent.info.run_id if parent else None)
        run.log_checkpoint(folder, digest=facts["digest"])
        run.finish("FINISHED", end_time=written)
    return run


def _add_report(run: Run, workspace: Workspace, name: str) -> None:
    """The final metrics, where the run lacks them: an evaluation that was pulled, or made while the store was down."""
    metrics = workspace.report(name) / "metrics.json"
    if metrics.exists():
        run.log_metrics(_read(metrics))
    log_evaluation(run, workspace, name)
    log_representation(run, workspace, name)


def _end_orphans(store: stores.Store) -> None:
    """A process killed outright leaves its run RUNNING; one that had recorded its weights had finished."""
    import psutil

    for record in store.client.search_runs([store.experiment], "attributes.status = 'RUNNING'", max_results=1000):
        node, _, process = record.data.tags.get(PROCESS, "").rpartition(":")
        if node == platform.node() and not psutil.pid_exists(int(process)):
            store.client.set_terminated(record.info.run_id, "FINISHED" if "advml.digest" in record.data.tags else "KILLED")


def _read(path: Path, *, needs: tuple[str, ...] = ()) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in needs if key not in value]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read: {' '.join(str(error).split())}; restore it with: dvc checkout {path.parent}") from None
    return value
