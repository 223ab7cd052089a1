"""What the stages have written, in MLflow: the files of a model in its run, other results as runs of their own.

Stages and `sync` log through the same functions, from files. The sha256 of the files is the tag that is written last: it says that all of
them have been logged, and a run that carries another one, or none, is brought up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from advml.config import Config
from advml.core.io import read_csv, read_json, read_yaml, sha256
from advml.evaluation.verdict import NONE, transferred, verdict
from advml.paths import REPORT_FILES, SEARCH_FILES, TRANSFER_FILES, Workspace
from advml.tracking import store as stores
from advml.tracking.run import COMMIT, DIGEST, MODEL, Run, guarded

# First words of what `evaluate` and `represent` measure.
EVALUATION, REPRESENTATION = ("accuracy", "corruption", "diagnostics"), ("cka", "probe")
FLAGS, REMEDY = "advml.flags", "restore it with: dvc checkout"

# Parts of a model's run


def log_parts(run: Run, folder: Path) -> bool:
    """Log what the run of the model in `folder` lacks of the files beside it; False if it lacks nothing."""
    name, workspace = folder.name, Workspace(run.store.place.root)
    reports = workspace.report(name)
    evaluation = workspace.record("evaluate", name), *filter(Path.exists, [workspace.samples(name)])
    representation = (reports / file for file in ("cka.json", "cka.npz", "cka.png", "layers.png"))
    logged = [
        log_training(run, folder),
        _log_part(run, "evaluation", evaluation, _log_evaluation),
        _log_part(run, "representation", (workspace.record("represent", name), *representation), _log_representation),
        _log_transfer_flags(run, workspace, name),
    ]
    return any(logged)


@guarded
def log_training(run: Run, folder: Path) -> bool:
    """Log what a training phase has written: parameters, curves, point by point and as a picture."""
    return _log_part(
        run, "training", (folder / "model.json", Workspace(run.store.place.root).report(folder.name) / "history.json"), _log_training
    )


@guarded
def log_model(run: Run, folder: Path, *, digest: str) -> None:
    """The same, and the model itself: with that, the run of the training is complete."""
    log_training(run, folder)
    run.log_checkpoint(folder, digest=digest)


def _log_part(run: Run, part: str, files: tuple[Path, ...], log: Callable[..., None]) -> bool:
    """Log files by `log`, unless some are missing, the run has them already, or the first one, a record, is of other weights."""
    if not all(file.exists() for file in files) or run.tags.get(tag := f"advml.{part}") == (made := sha256(*files)):
        return False
    record = read_json(files[0], needs=("digest",), remedy=REMEDY)
    if run.tags.get(DIGEST, record["digest"]) != record["digest"]:  # trained anew, and not yet measured
        return False
    run.log_params(record.get("parameters", {}))
    log(run, record, *files)
    run.set_tags({tag: made})
    return True


def _log_training(run: Run, record: Mapping[str, Any], file: Path, curves: Path) -> None:
    history = read_json(curves, kind=list, remedy=REMEDY)
    run.log_epochs(history, at=written(file))
    if model := run.tags.get(MODEL):  # of before; a new one gets both later
        run.client.log_model_artifact(model, str(file))
        run.set_tags({COMMIT: record.get("git_commit")})
    if history:
        from advml.figures.training import training_curves  # matplotlib takes half a second to import: after the work, not before

        run.client.log_figure(run.id, training_curves(history, file.parent.name, selected=record.get("epoch")), "curves.png")


def _log_evaluation(run: Run, record: Mapping[str, Any], file: Path, *samples: Path) -> None:
    run.log_metrics(record["metrics"], instead_of=EVALUATION)
    run.set_tags({FLAGS: verdict(record.get("diagnostics", {}))})
    run.client.log_artifact(run.id, str(file), "records/evaluate")
    for path in samples:
        run.client.log_artifact(run.id, str(path), "samples")


def _log_representation(run: Run, record: Mapping[str, Any], file: Path, *files: Path) -> None:
    run.log_metrics(record["metrics"], instead_of=REPRESENTATION)
    for path in files:
        run.client.log_artifact(run.id, str(path), "cka")
        if path.suffix == ".png":
            run.log_image(path, key=path.stem)
    scalars = {key: value for key, value in record["metrics"].items() if key.count("/") == 1 and value is not None}
    run.log_table([{"model": file.stem, **scalars}], "cka/scalars.json")
    run.client.log_artifact(run.id, str(file), "records/represent")


def _log_transfer_flags(run: Run, workspace: Workspace, name: str) -> bool:
    """The flags that a transfer has given these weights."""
    path = workspace.report("transfer") / "transfer.json"
    content = read_json(path, needs=("seeds",), remedy=REMEDY) if path.exists() else {"seeds": []}
    if not any(block["digests"].get(name) == run.tags.get(DIGEST) for block in content["seeds"]):
        return False
    flags = ", ".join(flag["name"] for flag in transferred(content).get(name, ())) or NONE
    if run.tags.get("advml.transfer_flags") == flags:
        return False
    run.set_tags({"advml.transfer_flags": flags})
    return True


# Runs of their own


@dataclass(frozen=True)
class Result:
    """A run to be: the first one of the `files` in `folder` holds parameters and git commit; `log` logs more than the files."""

    kind: str
    name: str
    folder: Path
    files: tuple[str, ...]
    log: Callable[[Run, Path, dict[str, Any]], None]
    artifacts: str | None = None  # where the files go
    remedy: str = REMEDY  # for a damaged first file
    needs: tuple[str, ...] = ()  # keys of the first file
    read: Callable[..., dict[str, Any]] = read_json
    in_place: bool = False  # other files do not make a new run, but change the newest one of this name

    @property
    def paths(self) -> list[Path]:
        return [self.folder / file for file in self.files]


def results(workspace: Workspace) -> list[Result]:
    """What `compare`, `transfer`, `report`, `evaluate` (of models that are not of the grid) and `tune` have written."""
    compared = [path.parent for pattern in ("compare", "compare-*") for path in sorted(workspace.reports.glob(f"{pattern}/cka.json"))]
    found = [_comparison(folder) for folder in compared]
    found.append(
        Result("comparison", "transfer", workspace.report("transfer"), TRANSFER_FILES, _log_transfer, "transfer", needs=("seeds",))
    )
    claims_first = tuple(sorted(REPORT_FILES, key=lambda file: file != "claims.json"))
    found.append(Result("study", "study", workspace.reports, claims_first, _log_study, needs=("claims",)))
    for name, made in sorted(workspace.evaluations_of_given().items()):
        files = tuple(path.relative_to(workspace.root).as_posix() for path in (made, workspace.samples(name)))
        remedy = f"delete {made} and measure the model again with: advml evaluate"
        found.append(Result("evaluation", name, workspace.root, files, _log_given, remedy=remedy, needs=("metrics",)))
    for made in sorted(workspace.report("tune").glob(f"*/{SEARCH_FILES[0]}")):
        remedy = f"delete it and write it again with: advml tune, as for {made.parent.name} before"
        about = {"remedy": remedy, "needs": ("scored",), "read": read_yaml, "in_place": True}
        found.append(Result("search", made.parent.name, made.parent, SEARCH_FILES, _log_search, "tune", **about))
    return found


def _comparison(folder: Path) -> Result:
    return Result("comparison", folder.name, folder, ("cka.json", "cka.npz", "clean.png", "adversarial.png"), _log_comparison, "cka")


def log_result(config: Config, what: str | Path, *, root: Path) -> None:
    """Make the run of what a stage has just written. Never raises for the store's sake.

    Args:
        what: `study`, `transfer`, the name of a model that is not of the grid, or the folder of a comparison.
    """
    place = stores.locate(config, root=root)
    chosen = [_comparison(what)] if isinstance(what, Path) else [one for one in results(Workspace(place.root)) if one.name == what]
    for one in chosen:
        stores.attempt(place, partial(complete, result=one))


def complete(store: stores.Store, result: Result, *, rebuilt: bool = False) -> bool:
    """Make the run of a result, or what it lacks; False if it lacks nothing, or files are missing (there was nothing to compare).

    A run carries the sha256 of its files from its start as `advml.files`, and as DIGEST when all of them are logged.
    """
    if not all(path.exists() for path in result.paths):
        return False
    made = sha256(*result.paths)
    found = store.find(kind=result.kind, name=result.name, files=None if result.in_place else made)
    is_running = found is not None and found.info.status == "RUNNING"
    if result.in_place and is_running:  # its command is at work, and logs the files itself
        return False
    if found is not None and found.data.tags.get(DIGEST) == made:
        if is_running:  # the store went down before the very last word
            store.client.set_terminated(found.info.run_id, "FINISHED")
        return False
    content = result.read(result.paths[0], needs=result.needs, remedy=result.remedy)
    when = max(map(written, result.paths)) if rebuilt else None
    record = {
        "name": result.name,
        "kind": result.kind,
        "parameters": content.get("parameters", {}),
        "git_commit": content.get("git_commit"),
    }
    with Run.begin(store, record, tags={"files": made}, run_id=found and found.info.run_id, written=when) as run:
        run.strict = True
        for path in result.paths:
            run.client.log_artifact(run.id, str(path), result.artifacts)
        result.log(run, result.folder, content)
        run.set_tags({DIGEST: made})
    return True


def _log_study(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_table(read_csv(folder / "summary.csv"), "summary.json")
    run.log_table([{key: claim.get(key) for key in ("claim", "verdict", "seeds")} for claim in content["claims"]], "claims_table.json")


def _log_transfer(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_metrics({f"transfer_breaks/{one['model']}": one["transfer_breaks"] for block in content["seeds"] for one in block["breaks"]})
    run.log_table(read_csv(folder / "transfer.csv"), "transfer/pairs.json")
    run.log_image(folder / "transfer.png", key="transfer")


def _log_comparison(run: Run, folder: Path, content: dict[str, Any]) -> None:
    for kind in ("clean", "adversarial"):
        run.log_image(folder / f"{kind}.png", key=f"compare-{kind}")


def _log_given(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_metrics(content["metrics"])
    run.set_tags({FLAGS: verdict(content.get("diagnostics", {}))})


def _log_search(run: Run, folder: Path, content: dict[str, Any]) -> None:
    log_best(run, content["scored"])
    run.log_table(read_csv(folder / "trials.csv"), "tune/trials.json")


def log_best(run: Run, scored: Mapping[str, float]) -> None:
    """What the best trial of a search scored, as metrics of the search's run."""
    run.log_metrics({f"best/{name}": value for name, value in scored.items()}, instead_of=("best",))


def written(path: Path) -> int:
    """When a file was written, in ms since 1970: the time of what happened while no store was looking."""
    return int(1000 * path.stat().st_mtime)
