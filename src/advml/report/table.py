"""The result table: one row per model, from `reports/<MODEL>/metrics.json`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from advml.config import Grid
from advml.core.io import read_json
from advml.core.paths import Workspace, model_name
from advml.evaluation import records
from advml.evaluation.flag_summary import transfer_flags
from advml.figures.style import FLAGGED, MEANING, UNJUDGED, mark

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
}
NOT_ATTACKED = ("accuracy/clean", "corruption/mean")


def grid_rows(grid: Grid, seeds: Sequence[int], workspace: Workspace) -> list[Row]:
    """A row per evaluated model of the grid: `model`, `scheme`, `regime`, `seed` and all metrics, flat.

    Raises:
        UserError: a metrics.json is damaged.
    """
    found = []
    for seed, scheme, regime in itertools.product(seeds, grid.schemes, grid.regimes):
        name = model_name(scheme, regime, seed)
        path = workspace.report(name) / "metrics.json"
        if path.exists():
            metrics = read_json(path, remedy="measure again with: dvc repro")
            found.append({"model": name, "scheme": scheme, "regime": regime, "seed": seed, **metrics})
    flagged = transfer_flags(records.read_transfer(workspace))
    for row in found:
        row |= {"transfer/flags": len(flagged[row["model"]])} if row["model"] in flagged else {}
    return found


def cell(row: Row, metric: str) -> str:
    """`97.5 [95.3, 98.7]`: a percentage with its 95 % interval, or a dash. Attacked figures bear the `mark` of their model."""
    if metric not in row:
        return "-"
    figure = f"{100 * row[metric]:.1f} [{100 * row[f'{metric}/low']:.1f}, {100 * row[f'{metric}/high']:.1f}]"
    return figure if metric in NOT_ATTACKED else f"{figure} {mark(row)}".rstrip()


def footnote(table: list[Row]) -> str:
    """What the marks say, a line for each that a figure bears."""
    marked = {sign: [row["model"] for row in table if mark(row) == sign] for sign in (FLAGGED, UNJUDGED)}
    return "\n".join(f"{sign} {MEANING[sign]}: see advml show {models[0]}" for sign, models in marked.items() if models)


def to_markdown(table: list[Row]) -> str:
    """The table for a README: accuracies in percent with 95 % Wilson intervals."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {row['model']} | " + " | ".join(cell(row, metric) for metric in COLUMNS.values()) + " |" for row in table]
    notes = [f"\n{note}" for note in footnote(table).splitlines()]  # each a paragraph of its own
    return "\n".join(lines + notes) + "\n"
