"""Result table: one row per model, from `reports/<MODEL>/metrics.json`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advml.config import Grid
from advml.core.io import read_json
from advml.core.paths import Workspace, model_name, pretraining_name
from advml.core.training_cost import SECONDS, STEPS, cost_of
from advml.evaluation import records
from advml.evaluation.records import AT_CHANCE, is_at_chance, transfer_flags
from advml.figures.style import FLAGGED, MEANING, UNJUDGED, mark
from advml.recipes import REGIMES
from advml.similarity.statistics import Estimate, over_seeds

Row = dict[str, Any]

# Column of the printed table -> metric.
COLUMNS: dict[str, str] = {
    "clean": "accuracy/clean",
    "I, half epsilon": "accuracy/threat_model_1_half",
    "I": "accuracy/threat_model_1",
    "II, half epsilon": "accuracy/threat_model_2_half",
    "II": "accuracy/threat_model_2",
    "worst case": "accuracy/worst_case",
    "corrupted": "corruption/mean",
    "gradient steps": STEPS,  # of training, per image
    "seconds": SECONDS,
}
PRETRAINING, FINE_TUNING = "1 pretraining", "2 fine-tuning"  # numbered because DVC's page sorts names
NOT_ATTACKED = ("accuracy/clean", "corruption/mean")


def grid_rows(grid: Grid, seeds: Sequence[int], workspace: Workspace) -> list[Row]:
    """Rows of the evaluated models of the grid: `model`, `scheme`, `regime`, `seed`, all metrics, flat, and `at_chance` if it is flagged.

    Raises:
        UserError: a metrics.json is damaged.
    """
    found = []
    for seed, scheme, regime in itertools.product(seeds, grid.schemes, grid.regimes):
        name = model_name(scheme, regime, seed)
        path = workspace.report(name) / "metrics.json"
        if path.exists():
            metrics = read_json(path, remedy="measure again with: dvc repro")
            about = {"model": name, "scheme": scheme, "regime": regime, "seed": seed}
            found.append(about | metrics | cost_of(workspace, name))
    flagged = transfer_flags(records.read_transfer(workspace))
    for row in found:
        row |= {"transfer/flags": len(flagged[row["model"]])} if row["model"] in flagged else {}
        row |= {AT_CHANCE: True} if is_at_chance(records.read(workspace, "evaluate", row["model"])) else {}
    return found


def slim(table: list[Row]) -> dict[str, dict[str, float]]:
    """Main figures of a study by name and model, for `dvc metrics` and `dvc exp show`."""
    names = {metric.partition("/")[2]: metric for metric in (COLUMNS["worst case"], COLUMNS["II"], COLUMNS["clean"])}
    return {name: {row["model"]: round(row[metric], 4) for row in table if metric in row} for name, metric in names.items()}


def training_rows(table: list[Row], workspace: Workspace) -> list[Row]:
    """Rows per epoch of every model's pretraining and fine-tuning: `model`, `scheme`, `regime`, `phase`, and the epoch's record."""
    runs = {(row["model"], row["scheme"], row["regime"], FINE_TUNING) for row in table}
    phases = {(REGIMES[row["regime"]].pretraining, row["scheme"], row["seed"]) for row in table}
    runs |= {(pretraining_name(scheme, phase, seed), scheme, phase, PRETRAINING) for phase, scheme, seed in phases}
    found = []
    for model, scheme, regime, phase in sorted(runs):
        curves = workspace.report(model) / "history.json"
        history = read_json(curves, kind=list, remedy="restore it with: dvc checkout") if curves.exists() else []
        found += [{"model": model, "scheme": scheme, "regime": regime, "phase": phase, **epoch} for epoch in history]
    return found


def with_means(table: list[Row]) -> list[Row]:
    """Rows, preceded by the means over seeds of every scheme and regime with several seeds.

    A mean has `/sd`, the standard deviation over its S seeds, and an interval of half width sqrt(a^2 + b^2): a = t sd / sqrt(S), with
    S - 1 degrees of freedom, covers the variation between trainings; b, the mean half width of the seeds' own intervals, covers the error
    that all seeds share, because they use the same test images (as in `similarity.statistics.over_seeds`). Flags of all seeds are added.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in (row for row in table if "seed" in row):
        groups.setdefault((row["scheme"], row["regime"]), []).append(row)
    return [*(_mean(*of, rows) for of, rows in groups.items() if len(rows) > 1), *table]


def _mean(scheme: str, regime: str, rows: list[Row]) -> Row:
    found: Row = {"model": f"{scheme}-{regime}, mean of {len(rows)} seeds", "scheme": scheme, "regime": regime}
    for metric in (key for key in rows[0] if all(_is_measured(row, key) for row in rows)):
        values = [row[metric] for row in rows]
        mean, between = statistics.fmean(values), over_seeds([Estimate(value, np.zeros(0)) for value in values]).spread
        found |= {metric: mean, f"{metric}/sd": statistics.stdev(values)}
        for end, sign in (("low", -1), ("high", 1)):
            shared = statistics.fmean(abs(row[f"{metric}/{end}"] - row[metric]) for row in rows)
            value = mean + sign * math.hypot(between, shared)
            found[f"{metric}/{end}"] = min(1.0, max(0.0, value)) if metric in COLUMNS.values() else value
    found |= {key: statistics.fmean(row[key] for row in rows) for key in (STEPS, SECONDS) if all(key in row for row in rows)}
    flags = {key: sum(row.get(key, 0) for row in rows) for key in ("diagnostics/flags", "transfer/flags")}
    # A zero only if all seeds were judged
    return found | {key: count for key, count in flags.items() if count or all(key in row for row in rows)}


def _is_measured(row: Row, metric: str) -> bool:
    """Whether a metric and its interval exist and are not null."""
    return all(isinstance(row.get(f"{metric}{end}"), int | float) for end in ("", "/low", "/high"))


def given_records(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Records of external models that were evaluated, by name.

    Raises:
        UserError: a file is damaged.
    """
    needs = ("model", "digest", "data_digest", "metrics", "figures")
    return {
        name: read_json(path, needs=needs, remedy=f"measure again with: advml evaluate, or remove {path}")
        for name, path in sorted(workspace.evaluations_of_given().items())
    }


def given_row(name: str, record: Mapping[str, Any]) -> Row:
    """Row of an external model: its metrics, and norm and epsilon of its attacks."""
    attacked = record["figures"].get("accuracy/worst_case", {})
    threat = {key: attacked[key] for key in ("norm", "epsilon") if key in attacked}
    return {"model": name, **threat} | {key: value for key, value in record["metrics"].items() if value is not None}


def cell(row: Row, metric: str) -> str:
    """Cell of the table: a percentage with its 95 % interval (`97.5 [95.3, 98.7]`), a cost (`1,234`), or a dash.

    A mean over seeds also has their standard deviation: `97.5 ± 0.4 [95.3, 98.7]`. Attacked figures have the `mark` of their model.
    """
    if metric not in row:
        return "-"
    if metric in (STEPS, SECONDS):
        return f"{row[metric]:,.0f}"
    spread = f" ± {100 * row[f'{metric}/sd']:.1f}" if f"{metric}/sd" in row else ""
    figure = f"{100 * row[metric]:.1f}{spread} [{100 * row[f'{metric}/low']:.1f}, {100 * row[f'{metric}/high']:.1f}]"
    return figure if metric in NOT_ATTACKED else f"{figure} {mark(row)}".rstrip()


def footnote(table: list[Row]) -> str:
    """Explanation of the marks that occur in the table, one line each."""
    marked = {sign: [row["model"] for row in table if mark(row) == sign] for sign in (FLAGGED, UNJUDGED)}
    return "\n".join(f"{sign} {MEANING[sign]}: see advml show {models[0]}" for sign, models in marked.items() if models)


def to_markdown(table: list[Row]) -> str:
    """Table in Markdown: accuracies in percent with 95 % intervals, means over seeds first."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {row['model']} | " + " | ".join(cell(row, metric) for metric in COLUMNS.values()) + " |" for row in with_means(table)]
    notes = [f"\n{note}" for note in footnote(table).splitlines()]  # one paragraph per note
    return "\n".join(lines + notes) + "\n"
