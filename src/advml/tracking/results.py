"""What the stages have written, in MLflow: the files of a model in its run, other results as runs of their own.

The tag with the sha256 of the files is written last: it says that all of them have been logged; another one, or none, that some are not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from advml.core.io import modified, read_csv, read_json, sha256
from advml.core.paths import REPORT_FILES, SEARCH_FILES, TRANSFER_FILES, Workspace
from advml.core.training_cost import training_cost
from advml.evaluation.flag_summary import NONE, flag_summary, transfer_flags
from advml.tracking import store as stores
from advml.tracking.names import COMMIT, DIGEST, FLAGS, MODEL, RESULT, TRANSFER_FLAGS
from advml.tracking.parameters import comparable
from advml.tracking.run import Record, Run, guarded

# What is logged of `evaluate` and `represent` as metrics, by first word; intervals and all others are in tables.
EVALUATION = {
    "accuracy": ("clean", "threat_model_1_half", "threat_model_1", "threat_model_2_half", "threat_model_2", "worst_case"),
    "corruption": ("mean",),
    "diagnostics": ("flags",),
}
REPRESENTATION = {"cka": ("redundancy", "clean_adversarial", "effective_layers", "rankme"), "probe": ("clean", "adversarial")}
QUOTED = {"clean": "accuracy/clean", "under threat model II": "accuracy/threat_model_2", "worst case": "accuracy/worst_case"}
REMEDY = "restore it with: dvc checkout"


def log_parts(run: Run, folder: Path) -> bool:
    """Log what the run of the model in `folder` lacks of what later stages have written about it; False if it lacks nothing."""
    name, workspace = folder.name, Workspace(run.store.place.root)
    evaluation = workspace.record("evaluate", name), *filter(Path.exists, [workspace.samples(name)])
    representation = workspace.record("represent", name), *_in(workspace.report(name), ("cka.json", "cka.npz", "cka.png", "layers.png"))
    logged = [
        _log_part(run, "evaluation", evaluation, _log_evaluation),
        _log_part(run, "representation", representation, _log_representation),
        _log_transfer_flags(run, workspace, name),
    ]
    return any(logged)


@guarded
def log_model(run: Run, folder: Path, *, digest: str) -> bool:
    """Log what a training phase has written, and with it complete its run; False if the run was complete."""
    workspace = Workspace(run.store.place.root)
    learnt = phases(workspace, folder)
    curves = [workspace.report(name) / "history.json" for name in (folder.name, *(record["name"] for record, _ in learnt[1:]))]
    files = folder / "model.json", curves[0], *filter(Path.exists, curves[1:])
    logged = _log_part(run, "training", files, partial(_log_training, learnt=learnt))
    run.log_checkpoint(folder, digest=digest)
    return logged


def _log_part(run: Run, part: str, files: tuple[Path, ...], log: Callable[..., None]) -> bool:
    """Log files by `log`, unless some are missing, the run has them already, or the first one, a record, is of other weights."""
    if not all(file.exists() for file in files) or run.tags.get(tag := f"advml.{part}") == (made := sha256(*files)):
        return False
    record = read_json(files[0], needs=("digest",), remedy=REMEDY)
    if run.tags.get(DIGEST, record["digest"]) != record["digest"]:  # trained anew, and not yet measured
        return False
    run.log_params(comparable({key: value for key, value in record.items() if part == "training" or key == "parameters"}))
    run.log_config(part, record.get("parameters"))
    log(run, record, *files)
    run.describe(part)
    run.set_tags({tag: made})
    return True


def phases(workspace: Workspace, folder: Path, *, digest: str | None = None) -> list[tuple[Record, list[Record]]]:
    """Record and curves of the model in `folder`, then of the pretraining that it started from; none that is not here, or of other weights.

    Args:
        digest: of the weights that are meant; None: those that are there.
    """
    made, curves = folder / "model.json", workspace.report(folder.name) / "history.json"
    record = read_json(made, needs=("digest",), remedy=REMEDY) if made.exists() else {}
    if not record or digest not in (None, record["digest"]):
        return []
    history, parent = read_json(curves, kind=list, remedy=REMEDY) if curves.exists() else [], record.get("pretraining")
    before = phases(workspace, workspace.pretrained(parent["name"]), digest=parent["digest"]) if parent else []
    return [(record, history), *before]


def _log_training(run: Run, record: Record, file: Path, *_: Path, learnt: Sequence[tuple[Record, list[Record]]]) -> None:
    run.log_epochs(learnt[0][1], at=modified(file))
    run.log_metrics(training_cost(Workspace(run.store.place.root), record))
    if model := run.tags.get(MODEL):  # of before; a new one gets both later
        run.client.log_model_artifact(model, str(file))
        run.set_tags({COMMIT: record.get("git_commit")})
    if drawn := {one["name"]: (history, one.get("epoch")) for one, history in reversed(learnt) if history}:
        from advml.figures.training import training_curves  # matplotlib takes half a second to import: after the work, not before

        run.client.log_figure(run.id, training_curves(drawn), "curves.png")


def _log_evaluation(run: Run, record: Record, file: Path, *samples: Path) -> None:
    _log_accuracies(run, record)
    _log_files(run, "records/evaluate", file)
    _log_files(run, "samples", *samples)


def _log_representation(run: Run, record: Record, file: Path, *files: Path) -> None:
    _log_measures(run, record["metrics"], REPRESENTATION, table="representation.json")
    _log_files(run, "records/represent", file)
    _log_files(run, "cka", *(path for path in files if path.suffix != ".png"))
    _log_files(run, None, *(path for path in files if path.suffix == ".png"), grid="")  # where Compare shows those of all runs together


def _log_accuracies(run: Run, record: Record) -> None:
    _log_measures(run, record["metrics"], EVALUATION, table="evaluation.json")
    run.set_tags({FLAGS: flag_summary(record.get("diagnostics", {})), RESULT: _in_words(record["metrics"])})


def _log_measures(run: Run, measures: Record, shown: Mapping[str, Sequence[str]], *, table: str) -> None:
    """Those that are `shown` as metrics, all of them, with their intervals, as a table: a row each, so that those of runs line up."""
    names = {f"{word}/{name}" for word, ends in shown.items() for name in ends}
    run.log_metrics({name: value for name, value in measures.items() if name in names}, instead_of=tuple(shown))
    rows = [
        {"figure": name, "value": value, **{end: measures.get(f"{name}/{end}") for end in ("low", "high")}}
        for name, value in measures.items()
        if name.count("/") == 1
    ]
    run.log_table(rows, table)


def _in_words(measures: Record) -> str:
    """`clean 97.5 % [95.3, 98.7], ...`: of the test images, with 95 % intervals."""
    told = []
    for words, name in QUOTED.items():
        values = [measures.get(f"{name}{end}") for end in ("", "/low", "/high")]
        if values[0] is not None:
            share, *ends = (f"{100 * value:.1f}" for value in values if value is not None)
            told.append(f"{words} {share} %" + (f" [{', '.join(ends)}]" if ends else ""))
    return ", ".join(told)


def _log_files(run: Run, folder: str | None, *files: Path, grid: str | None = None) -> None:
    """Copy files into a folder of the artifacts, and pictures into the UI's image grid, which compares runs by `grid` and their name."""
    for path in files:
        if path.suffix == ".png" and grid is not None:  # first: the grid keeps every picture that it is given, the file tells which
            if _has_file(run, path, folder):
                continue
            from PIL import Image

            with Image.open(path) as image:
                run.client.log_image(run.id, image.copy(), key=f"{grid}{path.stem}", step=0)
        run.client.log_artifact(run.id, str(path), folder)


def _has_file(run: Run, file: Path, folder: str | None) -> bool:
    """Whether the folder of the artifacts holds this file, byte for byte."""
    name = f"{folder}/{file.name}" if folder else file.name
    if name not in {entry.path for entry in run.client.list_artifacts(run.id, folder)}:
        return False
    with tempfile.TemporaryDirectory() as place:
        return Path(run.client.download_artifacts(run.id, name, place)).read_bytes() == file.read_bytes()


def _log_transfer_flags(run: Run, workspace: Workspace, name: str) -> bool:
    """The flags that a transfer has given these weights."""
    path = workspace.report("transfer") / "transfer.json"
    content = read_json(path, needs=("seeds",), remedy=REMEDY) if path.exists() else {"seeds": []}
    flags = ", ".join(flag["name"] for flag in transfer_flags(content).get(name, ())) or NONE
    weights = {block["digests"].get(name) for block in content["seeds"]}
    if run.tags.get(DIGEST) not in weights or run.tags.get(TRANSFER_FLAGS) == flags:
        return False
    run.set_tags({TRANSFER_FLAGS: flags})
    run.describe()
    return True


@dataclass(frozen=True)
class Result:
    """A run to be. The first one of the files is a record, with parameters and git commit."""

    kind: str
    name: str
    files: tuple[Path, ...]
    log: Callable[..., None]
    needs: tuple[str, ...] = ()  # keys of the record
    remedy: str = REMEDY  # for a damaged record
    in_place: bool = False  # other files do not make a new run, but change the newest one of this name


def results(workspace: Workspace) -> list[Result]:
    """What `compare`, `transfer`, `report`, `evaluate` (of models that are not of the grid) and `tune` have written."""
    compared = [path.parent for pattern in ("compare", "compare-*") for path in sorted(workspace.reports.glob(f"{pattern}/cka.json"))]
    claims_first = sorted(REPORT_FILES, key=lambda file: file != "claims.json")
    found = [
        *map(comparison, compared),
        Result("comparison", "transfer", _in(workspace.report("transfer"), TRANSFER_FILES), _log_transfer, ("seeds",)),
        Result("study", "study", _in(workspace.reports, claims_first), _log_study, ("claims",)),
    ]
    for name, made in sorted(workspace.evaluations_of_given().items()):
        remedy = f"delete {made} and measure the model again with: advml evaluate"
        found.append(Result("evaluation", name, (made, workspace.samples(name)), _log_given, ("metrics",), remedy))
    for made in sorted(workspace.report("tune").glob(f"*/{SEARCH_FILES[0]}")):
        name, files = made.parent.name, _in(made.parent, SEARCH_FILES)
        remedy = f"delete it and write it again with: advml tune, as for {name} before"
        found.append(Result("search", name, files, _log_search, ("scored",), remedy, in_place=True))
    return found


def comparison(folder: Path) -> Result:
    """Of a folder that `compare` has written."""
    files = (*_in(folder, ("cka.json", "cka.npz", "clean.png")), *sorted({*folder.glob("*.png")} - {folder / "clean.png"}))
    return Result("comparison", folder.name, files, lambda run, _, *files: _log_files(run, "cka", *files, grid="compare-"))


def _in(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names)


def complete(store: stores.Store, result: Result, *, rebuilt: bool = False) -> bool:
    """Make the run of a result, or what it lacks; False if it lacks nothing, or files are missing (there was nothing to compare)."""
    if not all(path.exists() for path in result.files):
        return False
    made = sha256(*result.files)
    found = store.find(kind=result.kind, name=result.name, files=None if result.in_place else made)
    if found and result.in_place and found.info.status == "RUNNING":  # its command is at work, and logs the files itself
        return False
    if found is not None and found.data.tags.get(DIGEST) == made:
        return False
    content = read_json(result.files[0], needs=result.needs, remedy=result.remedy)
    record = {"name": result.name, "kind": result.kind} | {key: content[key] for key in ("parameters", "git_commit") if key in content}
    record["title"] = _title(record, written_now=not rebuilt)
    about = {"run_id": found and found.info.run_id, "written": max(map(modified, result.files)) if rebuilt else None}
    with Run.begin(store, record, tags={"files": made}, **about) as run:
        run.strict = True
        result.log(run, content, *result.files)
        run.describe()
        run.set_tags({DIGEST: made})
    return True


def _title(record: Record, *, written_now: bool) -> str:
    """`study 337986e`: results of one name are told apart by commit and, while DVC runs one, by its experiment."""
    commit, dash, dirty = (record.get("git_commit") or "").partition("-")
    experiment = os.environ.get("DVC_EXP_NAME", "") if written_now else ""
    return " ".join(filter(None, (record["name"], f"{commit[:7]}{dash}{dirty}", experiment)))


def _log_transfer(run: Run, record: Record, *files: Path) -> None:
    _log_files(run, "transfer", *files, grid="")
    run.log_metrics({f"transfer_breaks/{one['model']}": one["transfer_breaks"] for block in record["seeds"] for one in block["breaks"]})
    run.log_table(read_csv(files[0].with_name("transfer.csv")), "transfer/pairs.json")


def _log_study(run: Run, record: Record, *files: Path) -> None:
    _log_files(run, None, *files)
    run.log_table(read_csv(files[0].with_name("summary.csv")), "summary.json")
    run.log_table([{key: claim.get(key) for key in ("claim", "verdict", "seeds")} for claim in record["claims"]], "claims_table.json")
    run.set_tags({RESULT: " ".join(record.get("finding", ())) or None})


def _log_given(run: Run, record: Record, *files: Path) -> None:
    _log_files(run, None, *files)
    _log_accuracies(run, record)


def _log_search(run: Run, record: Record, *files: Path) -> None:
    _log_files(run, "tune", *files)
    log_winner(run, record)
    run.log_table(read_csv(files[0].with_name("trials.csv")), "tune/trials.json")


def log_winner(run: Run, record: Record) -> None:
    """What the best trial scored on validation, and its figures on test beside the default's, with the p or the interval of the difference.

    Args:
        record: the content of best.yaml: `scored`, and what was measured in the end. An attack search compares accuracies under two
            attacks on the same images, a training search the means over further seeds.
    """
    test = record.get("test") or record.get("confirmed", {}).get("test", {})
    paired = test.get("paired") or test.get("difference", {}).get("robust", {})
    found = {f"best/{name}": value for name, value in record["scored"].items()}
    for who in ("winner", "default"):
        measured = test.get(who, {})
        found[f"test/{who}"] = measured.get("accuracy", measured.get("robust", {}).get("mean"))
    found["test/difference"] = paired.get("difference", paired.get("mean"))
    run.log_metrics(found | {f"test/{key}": paired.get(key) for key in ("p", "low", "high")}, instead_of=("best", "test"))
