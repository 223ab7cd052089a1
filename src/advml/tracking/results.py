"""Results of stages as MLflow shows them: those of a model belong to its run, others have runs of their own.

The first file of a result is its record, a JSON file with the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advml.core.io import read_json, sha256
from advml.core.paths import REPORT_FILES, SEARCH_FILES, TRANSFER_FILES, Workspace
from advml.evaluation.records import flag_summary
from advml.tracking.store import FLAGS, RESULT

Record = Mapping[str, Any]
# Metrics logged from `evaluate` and `represent`, by first word; all others, and intervals, go to tables.
EVALUATION = {
    "accuracy": ("worst_case", "clean", "threat_model_2", "threat_model_2_half", "threat_model_1", "threat_model_1_half"),
    "corruption": ("mean",),
    "diagnostics": ("flags",),
}
REPRESENTATION = {"cka": ("redundancy", "clean_adversarial", "effective_layers", "rankme"), "probe": ("clean", "adversarial")}
QUOTED = {"clean": "accuracy/clean", "under threat model II": "accuracy/threat_model_2", "worst case": "accuracy/worst_case"}
REMEDY = "restore it with: dvc checkout"


@dataclass(frozen=True)
class Result:
    """Files of one result, and what is logged from its record besides parameters and copies of the files."""

    kind: str  # kind of the run; within a model's run, kind of the result
    name: str
    files: Mapping[str, Sequence[Path]]  # folder among the artifacts -> files
    needs: tuple[str, ...] = ()  # required keys of the record
    remedy: str = REMEDY  # ends the error message for a damaged record
    metrics: Callable[[Record], Record] = lambda record: {}
    replaced: tuple[str, ...] = ()  # first words of metrics that become NaN if missing in the record
    tables: Mapping[str, str | Callable[[Record], Sequence[Record]]] = field(default_factory=dict)  # path -> rows, or a CSV file's name
    tags: Callable[[Record], Mapping[str, str | None]] = lambda record: {}
    grid: str | None = None  # prefix of pictures in the UI's image grid; None: not shown there
    in_place: bool = False  # changed files update the newest run of this name, instead of creating one

    @property
    def all_files(self) -> list[Path]:
        return [file for files in self.files.values() for file in files]

    def digest(self) -> str | None:
        """sha256 of all files; None if one is missing."""
        return sha256(*self.all_files) if all(file.exists() for file in self.all_files) else None

    def read(self) -> Record:
        """Return the record; raises UserError if it is damaged."""
        return read_json(self.all_files[0], needs=self.needs, remedy=self.remedy)


def _figures(record: Record) -> Sequence[Record]:
    """Table of all figures with their intervals, one row each."""
    measures = record["metrics"]
    ends = {name: {end: measures.get(f"{name}/{end}") for end in ("low", "high")} for name in measures if name.count("/") == 1}
    return [{"figure": name, "value": measures[name], **interval} for name, interval in ends.items()]


def _claims(record: Record) -> Sequence[Record]:
    return [{key: claim.get(key) for key in ("claim", "verdict", "seeds")} for claim in record["claims"]]


def _judged(record: Record) -> Record:
    """Tags: flags, and test accuracies with 95 % intervals, as `clean 97.5 % [95.3, 98.7], ...`."""
    told = []
    for words, name in QUOTED.items():
        values = [record["metrics"].get(f"{name}{end}") for end in ("", "/low", "/high")]
        if values[0] is not None:
            share, *ends = (f"{100 * value:.1f}" for value in values if value is not None)
            told.append(f"{words} {share} %" + (f" [{', '.join(ends)}]" if ends else ""))
    return {FLAGS: flag_summary(record.get("diagnostics", {})), RESULT: ", ".join(told)}


def winner(record: Record) -> dict[str, float]:
    """Metrics of a search: validation score of the best trial, test figures of winner and default, p or interval of their difference.

    Args:
        record: the content of best.yaml: `scored`, and the final measurements. An attack search compares accuracies under two
            attacks on the same images, a training search the means over further seeds.
    """
    test = record.get("test") or record.get("confirmed", {}).get("test", {})
    paired = test.get("paired") or test.get("difference", {}).get("robust", {})
    found = {f"best/{name}": value for name, value in record["scored"].items()}
    for which in ("winner", "default"):
        measured = test.get(which, {})
        found[f"test/{which}"] = measured.get("accuracy", measured.get("robust", {}).get("mean"))
    found["test/difference"] = paired.get("difference", paired.get("mean"))
    found |= {f"test/{key}": paired.get(key) for key in ("p", "low", "high")}
    return {name: value for name, value in found.items() if value is not None}


def _finding(record: Record) -> Mapping[str, str | None]:
    return {RESULT: " ".join(record.get("finding", ())) or None}


def _breaks(record: Record) -> Record:
    return {f"transfer_breaks/{one['model']}": one["transfer_breaks"] for block in record["seeds"] for one in block["breaks"]}


def _figures_of(names: Mapping[str, Sequence[str]], table: str) -> dict[str, Any]:
    """Fields of `Result` for records with figures: the named ones are metrics, all are rows of `table`."""
    chosen = [f"{word}/{end}" for word, ends in names.items() for end in ends]
    return {
        "metrics": lambda record: {name: record["metrics"].get(name) for name in chosen},
        "replaced": tuple(names),
        "tables": {table: _figures},
    }


# Fields of `Result` for each kind of record
EVALUATED = _figures_of(EVALUATION, "evaluation.json") | {"tags": _judged}
REPRESENTED = _figures_of(REPRESENTATION, "representation.json") | {"grid": "cka/"}
TRANSFERRED = {"needs": ("seeds",), "metrics": _breaks, "tables": {"transfer/pairs.json": "transfer.csv"}, "grid": ""}
REPORTED = {"needs": ("claims",), "tables": {"summary.json": "summary.csv", "claims_table.json": _claims}, "tags": _finding}
SEARCHED = {"needs": ("scored",), "metrics": winner, "replaced": ("best", "test"), "tables": {"tune/trials.json": "trials.csv"}}


def of_model(workspace: Workspace, name: str) -> list[Result]:
    """Results of a model that stages after training write."""
    samples, report = filter(Path.exists, [workspace.samples(name)]), workspace.report(name)
    evaluated = {"records/evaluate": [workspace.record("evaluate", name)], "samples": list(samples)}
    # Pictures are at the root of the artifacts, where Compare shows those of all runs together.
    represented = {"records/represent": [workspace.record("represent", name)], "cka": _in(report, ("cka.json", "cka.npz"))}
    represented |= {"": _in(report, ("cka.png", "layers.png"))}
    of_weights = ("digest", "metrics")
    return [
        Result("evaluation", name, evaluated, of_weights, **EVALUATED),
        Result("representation", name, represented, of_weights, **REPRESENTED),
    ]


def comparison(folder: Path) -> Result:
    """Result in a folder written by `compare`."""
    files = [*_in(folder, ("cka.json", "cka.npz", "clean.png")), *sorted({*folder.glob("*.png")} - {folder / "clean.png"})]
    return Result("comparison", folder.name, {"cka": files}, grid="compare-")


def search(folder: Path) -> Result:
    """Result in a folder written by `tune`."""
    remedy = f"delete it and write it again with: advml tune, as for {folder.name} before"
    return Result("search", folder.name, {"tune": _in(folder, SEARCH_FILES)}, remedy=remedy, in_place=True, **SEARCHED)


def results(workspace: Workspace) -> list[Result]:
    """Results with runs of their own: from `compare`, `transfer`, `report`, `evaluate` (external models) and `tune`."""
    compared = [path.parent for pattern in ("compare", "compare-*") for path in sorted(workspace.reports.glob(f"{pattern}/cka.json"))]
    claims_first = sorted(REPORT_FILES, key=lambda file: file != "claims.json")
    found = [
        *map(comparison, compared),
        Result("comparison", "transfer", {"transfer": _in(workspace.report("transfer"), TRANSFER_FILES)}, **TRANSFERRED),
        Result("study", "study", {"": _in(workspace.reports, claims_first)}, **REPORTED),
    ]
    for name, made in sorted(workspace.evaluations_of_given().items()):
        remedy = f"delete {made} and measure the model again with: advml evaluate"
        found.append(Result("evaluation", name, {"": (made, workspace.samples(name))}, ("metrics",), remedy, **EVALUATED))
    return found + [search(made.parent) for made in sorted(workspace.report("tune").glob(f"*/{SEARCH_FILES[0]}"))]


def phases(workspace: Workspace, folder: Path, *, digest: str | None = None) -> list[tuple[Record, list[Record]]]:
    """Record and curves of the model in `folder`, then of its pretraining; phases that are missing or have other weights are left out.

    Args:
        digest: sha256 of the weights; None: of those present.
    """
    made, curves = folder / "model.json", workspace.report(folder.name) / "history.json"
    record = read_json(made, needs=("digest",), remedy=REMEDY) if made.exists() else {}
    if not record or digest not in (None, record["digest"]):
        return []
    history, parent = read_json(curves, kind=list, remedy=REMEDY) if curves.exists() else [], record.get("pretraining")
    before = phases(workspace, workspace.pretrained(parent["name"]), digest=parent["digest"]) if parent else []
    return [(record, history), *before]


def _in(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names]
