"""Logging of stages' files to MLflow: by each stage after writing them, and by `sync` for all that is missing.

MLflow lags behind after `dvc pull`, a run-cache hit or an outage. The tag with the sha256 of files is written last: it says that all of
them have been logged; another one, or none, that some are not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from advml.core.errors import Failure, UserError
from advml.core.io import modified, read_csv, read_json
from advml.core.paths import Workspace
from advml.core.processes import has_ended
from advml.core.training_cost import training_cost
from advml.evaluation.records import NONE, transfer_flags
from advml.tracking import store as stores
from advml.tracking.parameters import comparable
from advml.tracking.registry import register_best
from advml.tracking.results import REMEDY, Record, Result, comparison, of_model, phases, results
from advml.tracking.run import Run, guarded
from advml.tracking.store import COMMIT, DIGEST, FOLDER, MODEL, PROCESS, REPLACED, TRANSFER_FLAGS


def sync(place: stores.Place) -> list[str]:
    """Complete the store: a run for every trained model and every result in `reports/`, with everything that stages log.

    Runs are known by the name and the sha256 of a folder's weights, or of a result's files; what belongs to a model's run, by the sha256
    of its files. A second time, nothing changes. Runs whose process on this machine is gone are ended too.

    Returns:
        The names of the runs created or brought up to date.
    Raises:
        UserError, Failure: a file is damaged; the store cannot be opened or written to.
    """
    workspace = Workspace(place.root)
    # Pretraining first, so that models can link its runs.
    folders = [path.parent for stage in (workspace.pretrained(""), workspace.models) for path in sorted(stage.glob("*/model.json"))]
    try:
        store = stores.connect(place)
        changed = [folder.name for folder in folders if _log_folder(store, folder)]
        _end_orphans(store)
        changed += [one.name for one in results(workspace) if _complete(store, one, rebuilt=True)]
        register_best(store)
        return changed
    except (Failure, UserError):
        raise
    except Exception as error:
        raise Failure(f"{stores.explain(place, error)}; mend the store or name another with -S tracking.uri=...") from error


def log_folder(place: stores.Place, folder: Path) -> None:
    """Log new files of the trained model in `folder`, as `sync` does. Errors of the store are not raised."""
    stores.attempt(place, lambda: _log_folder(stores.connect(place), folder))


def log_result(place: stores.Place, what: str | Path) -> None:
    """Create the run of a new result: `study`, `transfer`, the name of an external model, or the folder of a comparison."""

    def complete() -> None:
        store = stores.connect(place)
        for one in [comparison(what)] if isinstance(what, Path) else results(Workspace(place.root)):
            if isinstance(what, Path) or one.name == what:
                _complete(store, one)
        if what == "study":
            register_best(store)

    stores.attempt(place, complete)


def _log_folder(store: stores.Store, folder: Path) -> bool:
    """Update or create the run of a model, with the file's time as its time. False: it was complete."""
    record = read_json(folder / "model.json", needs=("name", "kind", "digest", "parameters", "data"), remedy=f"{REMEDY} {folder}")
    found, workspace = store.find(name=record["name"], digest=record["digest"], kind=record["kind"]), Workspace(store.place.root)
    made = contextlib.nullcontext(Run(store, found)) if found else Run.begin(store, record, written=modified(folder / "model.json"))
    with made as run:
        run.link(record.get("pretraining"))  # that run may have been created later
        logged = [log_model(run, folder, digest=record["digest"])]
        logged += [_add(run, part, log) for part in of_model(workspace, folder.name)]
        return any([*logged, _log_transfer_flags(run, folder.name), found is None])


@guarded
def log_model(run: Run, folder: Path, *, digest: str) -> bool:
    """Log the files of a training phase and mark its run as complete; False if it was."""
    workspace = Workspace(run.store.place.root)
    learnt = phases(workspace, folder)
    curves = [workspace.report(name) / "history.json" for name in (folder.name, *(record["name"] for record, _ in learnt[1:]))]
    files = folder / "model.json", curves[0], *filter(Path.exists, curves[1:])
    logged = _add(run, Result("training", folder.name, {"": files}, ("digest",)), partial(_log_training, learnt=learnt))
    run.log_checkpoint(folder, digest=digest)
    return any([logged, _mark_replaced(run)])


def _mark_replaced(run: Run) -> bool:
    """Add REPLACED to the names of other runs of this study's model, which have other weights, and remove it from this run's name."""
    model = " and ".join(f"tags.`{key}` = '{run.tags[key]}'" for key in ("advml.name", "advml.kind"))
    changed = False
    for found in run.client.search_runs([run.store.experiment], model, max_results=1000):
        tags, name = found.data.tags, found.info.run_name
        wanted = name.removesuffix(REPLACED) + REPLACED * (tags.get(DIGEST, run.tags[DIGEST]) != run.tags[DIGEST])
        if FOLDER in tags and tags[FOLDER] == run.tags.get(FOLDER) and name != wanted:
            run.client.update_run(found.info.run_id, name=wanted)
            changed = True
    return changed


def _add(run: Run, part: Result, log: Callable[[Run, Result, Record], None]) -> bool:
    """Add a result to a model's run, unless files are missing, already logged, or of other weights."""
    made = part.digest()
    if made is None or run.tags.get(tag := f"advml.{part.kind}") == made:
        return False
    record = part.read()
    if run.tags.get(DIGEST, record["digest"]) != record["digest"]:  # the model was trained again, and is not yet evaluated
        return False
    run.log_params(comparable(record if part.kind == "training" else {"parameters": record.get("parameters")}))
    run.log_config(part.kind, record.get("parameters"))
    log(run, part, record)
    run.set_tags({tag: made})
    return True


def log(run: Run, result: Result, record: Record) -> None:
    """Log a record and its files as `result` defines; pictures also to the UI's image grid, which compares runs by picture names."""
    run.log_metrics(result.metrics(record), replaced=result.replaced)
    for path, rows in result.tables.items():
        run.log_table(read_csv(result.all_files[0].with_name(rows)) if isinstance(rows, str) else rows(record), path)
    run.set_tags(result.tags(record))
    for folder, files in result.files.items():
        for file in files:
            if file.suffix == ".png" and result.grid is not None:
                run.log_picture(file, key=f"{result.grid}{file.stem}")
            run.client.log_artifact(run.id, str(file), folder or None)


def _log_training(run: Run, training: Result, record: Record, *, learnt: Sequence[tuple[Record, list[Record]]]) -> None:
    made = training.all_files[0]
    run.log_epochs(learnt[0][1], at=modified(made))
    run.log_metrics(training_cost(Workspace(run.store.place.root), record))
    if model := run.tags.get(MODEL):  # of an earlier call; a new model gets both later
        run.client.log_model_artifact(model, str(made))
        run.set_tags({COMMIT: record.get("git_commit")})
    if drawn := {one["name"]: (history, one.get("epoch")) for one, history in reversed(learnt) if history}:
        from advml.figures.training import training_curves  # matplotlib takes half a second to import: after the work, not before

        run.client.log_figure(run.id, training_curves(drawn), "curves.png")


def _log_transfer_flags(run: Run, name: str) -> bool:
    """Log the flags of these weights from the transfer."""
    path = Workspace(run.store.place.root).report("transfer") / "transfer.json"
    content = read_json(path, needs=("seeds",), remedy=REMEDY) if path.exists() else {"seeds": []}
    flags = ", ".join(flag["name"] for flag in transfer_flags(content).get(name, ())) or NONE
    weights = {block["digests"].get(name) for block in content["seeds"]}
    if run.tags.get(DIGEST) not in weights or run.tags.get(TRANSFER_FLAGS) == flags:
        return False
    run.set_tags({TRANSFER_FLAGS: flags})
    return True


def _complete(store: stores.Store, result: Result, *, rebuilt: bool = False) -> bool:
    """Create or complete the run of a result; False if it is complete, or files are missing (such as of an empty comparison)."""
    if (made := result.digest()) is None:
        return False
    found = store.find(kind=result.kind, name=result.name, files=None if result.in_place else made)
    if found and result.in_place and found.info.status == "RUNNING":  # the running command logs the files itself
        return False
    if found is not None and found.data.tags.get(DIGEST) == made:
        return False
    content = result.read()
    record = {"name": result.name, "kind": result.kind} | {key: content[key] for key in ("parameters", "git_commit") if key in content}
    record["title"] = _title(record, written_now=not rebuilt)
    about = {"run_id": found and found.info.run_id, "written": max(map(modified, result.all_files)) if rebuilt else None}
    with Run.begin(store, record, tags={"files": made}, **about) as run:
        log(run, result, content)
        run.set_tags({DIGEST: made})
    return True


def _title(record: Record, *, written_now: bool) -> str:
    """Title such as `study 337986e`, with the commit and, under `dvc exp run`, the experiment's name."""
    commit, dash, dirty = (record.get("git_commit") or "").partition("-")
    experiment = os.environ.get("DVC_EXP_NAME", "") if written_now else ""
    return " ".join(filter(None, (record["name"], f"{commit[:7]}{dash}{dirty}", experiment)))


def _end_orphans(store: stores.Store) -> None:
    """End runs that are RUNNING although their process is gone: FINISHED if their weights were logged, else KILLED."""
    for found in store.client.search_runs([store.experiment], "attributes.status = 'RUNNING'", max_results=1000):
        if has_ended((tags := found.data.tags).get(PROCESS, "")):
            had_finished = DIGEST in tags and tags.get("advml.kind") != "search"  # searches continue after logging results
            store.client.set_terminated(found.info.run_id, "FINISHED" if had_finished else "KILLED")
