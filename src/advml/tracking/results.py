"""The runs of what stands beside the models' own: the study's report, its transfer, comparisons, searches, evaluations of given models.

Each is made from files by one function, which the stage calls as `sync` does. A run carries the sha256 of its files twice: as `advml.files`
from its start, and as `advml.digest` when all of them are logged. One that lacks the latter was cut short, and is gone on with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.evaluation.flag_summary import NONE, flag_summary, transfer_flags
from advml.paths import REPORT_FILES, SEARCH_FILES, TRANSFER_FILES, Workspace
from advml.tracking import store as stores
from advml.tracking.files import digest, read, read_table, read_yaml
from advml.tracking.run import Run
from advml.tracking.runs import Kind, search
from advml.tracking.start import Facts, origin, start
from advml.tracking.training import written

if TYPE_CHECKING:
    from advml.config import Config

FLAGS = "advml.transfer_flags"


@dataclass(frozen=True)
class Result:
    """A run to be: `files` are in `folder`, the first one tells parameters and git commit; `log` logs the rest."""

    kind: Kind
    name: str
    folder: Path
    files: tuple[str, ...]
    log: Callable[[Run, Path, dict[str, Any]], None]
    artifacts: str | None = None  # where the files go
    needs: tuple[str, ...] = ()  # keys of the first file
    remedy: str | None = None  # for a damaged first file; None: DVC has it
    read: Callable[..., Any] = read  # the first file
    in_place: bool = False  # other files do not make a new run, but change the newest one of this name

    @property
    def paths(self) -> list[Path]:
        return [self.folder / file for file in self.files]


def study(workspace: Workspace) -> Result:
    """What `report` has written."""
    files = ("claims.json", *(file for file in REPORT_FILES if file != "claims.json"))
    return Result("study", "study", workspace.reports, files, _log_study, needs=("claims",))


def transfer(workspace: Workspace) -> Result:
    """What `transfer` has written; see also `log_transfer`."""
    return Result(
        "comparison", "transfer", workspace.report("transfer"), TRANSFER_FILES, _log_transfer, artifacts="transfer", needs=("seeds",)
    )


def comparison(folder: Path) -> Result:
    """What `compare` has written."""
    return Result(
        "comparison", folder.name, folder, ("cka.json", "cka.npz", "clean.png", "adversarial.png"), _log_comparison, artifacts="cka"
    )


def evaluation(workspace: Workspace, name: str) -> Result:
    """What `evaluate` has written of a model that is not of the grid."""
    made = workspace.evaluations_of_given()[name]
    files = tuple(str(path.relative_to(workspace.root)) for path in (made, workspace.samples(name)))
    remedy = f"delete {made} and measure the model again with: advml evaluate"
    return Result("evaluation", name, workspace.root, files, _log_evaluation, needs=("metrics",), remedy=remedy)


def search_of(folder: Path) -> Result:
    """What `advml tune` has found; that command makes the run, with a nested run per trial."""
    remedy = f"delete it and write it again with: advml tune, as for {folder.name} before"
    return Result("search", folder.name, folder, SEARCH_FILES, _log_search, "tune", ("scored",), remedy, read_yaml, in_place=True)


def results(workspace: Workspace) -> list[Result]:
    """Everything of this sort in `reports/`."""
    compared = [path.parent for pattern in ("compare", "compare-*") for path in sorted(workspace.reports.glob(f"{pattern}/cka.json"))]
    given = sorted(workspace.evaluations_of_given())
    searches = [path.parent for path in sorted(workspace.report("tune").glob(f"*/{SEARCH_FILES[0]}"))]
    of_grid = [*map(comparison, compared), transfer(workspace), study(workspace)]
    return [*of_grid, *(evaluation(workspace, name) for name in given), *map(search_of, searches)]


def log_result(config: Config, result: Result, *, root: Path) -> None:
    """Make the run of what a stage has just written. Never raises for the store's sake."""
    place = stores.locate(config, root=root)
    stores.attempt(place, lambda store: complete(place, store, result, root=Path(root).resolve()))


def complete(place: stores.Place, store: stores.Store, result: Result, *, root: Path, synced: bool = False) -> bool:
    """Make the run of a result, or what it lacks; False if it lacks nothing, or files are missing (there was nothing to compare)."""
    if not all(path.exists() for path in result.paths):
        return False
    made = digest(*result.paths)
    record = search(store, kind=result.kind, name=result.name, files=None if result.in_place else made)
    if record is not None and result.in_place and record.info.status == "RUNNING":  # its command is at work, and logs the files itself
        return False
    if record is not None and record.data.tags.get("advml.digest") == made:
        if record.info.status == "RUNNING":  # the store went down before the very last word
            store.client.set_terminated(record.info.run_id, "FINISHED")
        return False
    content = result.read(result.paths[0], needs=result.needs, remedy=result.remedy)
    when = max(map(written, result.paths)) if synced else None
    tags = {"files": made} | (origin(content) | {"synced": "true"} if synced else {})
    facts = Facts(result.name, result.kind, tags, content.get("parameters", {}))
    begun = start(store, facts, root=root, run_id=record.info.run_id if record else None, start_time=when)
    with Run(place, store, begun, root=root, strict=True) as run:
        for path in result.paths:
            run.log_file(path, result.artifacts)
        result.log(run, result.folder, content)
        run.set_tag("advml.digest", made)
        run.finish("FINISHED", end_time=when)
    return True


def log_transfer(run: Run, workspace: Workspace, name: str) -> bool:
    """Tag the run of a model with the flags of a transfer; False if the run has them, or these weights have not been in one."""
    path = workspace.report("transfer") / "transfer.json"
    content = read(path, needs=("seeds",)) if path.exists() else {"seeds": []}
    scored = {model: weights for block in content["seeds"] for model, weights in block["digests"].items()}
    if name not in scored or scored[name] != run.tag("advml.digest"):
        return False
    flags = ", ".join(flag["name"] for flag in transfer_flags(content).get(name, ())) or NONE
    if run.tag(FLAGS) == flags:
        return False
    run.set_tag(FLAGS, flags)
    return True


def _log_study(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_table(read_table(folder / "summary.csv"), "summary.json")
    run.log_table([{key: claim.get(key) for key in ("claim", "verdict", "seeds")} for claim in content["claims"]], "claims_table.json")


def _log_transfer(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_metrics({f"transfer_breaks/{one['model']}": one["transfer_breaks"] for block in content["seeds"] for one in block["breaks"]})
    run.log_table(read_table(folder / "transfer.csv"), "transfer/pairs.json")
    run.log_image(folder / "transfer.png", key="transfer")


def _log_comparison(run: Run, folder: Path, content: dict[str, Any]) -> None:
    for kind in ("clean", "adversarial"):
        run.log_image(folder / f"{kind}.png", key=f"compare-{kind}")


def _log_evaluation(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_metrics(content["metrics"])
    run.set_tag("advml.flags", flag_summary(content.get("diagnostics", {})))


def _log_search(run: Run, folder: Path, content: dict[str, Any]) -> None:
    run.log_metrics(best_scores(content["scored"]), instead_of=("best",))
    run.log_table(read_table(folder / "trials.csv"), "tune/trials.json")


def best_scores(scored: Mapping[str, float]) -> dict[str, float]:
    """What the best trial of a search scored, as metrics of the search's run."""
    return {f"best/{name}": value for name, value in scored.items()}
