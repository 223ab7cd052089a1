"""The result table: one row per model, from `reports/<MODEL>/metrics.json`."""

from __future__ import annotations

import csv
import io
import itertools
import json
from typing import Any

from advml.config import Config
from advml.errors import UserError
from advml.evaluation import transfer_files
from advml.paths import Workspace, model_name

Row = dict[str, Any]

NORM_NAMES = {"linf": "L-infinity", "l2": "L2"}

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


def grid_rows(configuration: Config, workspace: Workspace) -> list[Row]:
    """A row per evaluated model of the grid: `model`, `scheme`, `regime`, `seed` and all metrics, flat.

    Raises:
        UserError: a metrics.json is damaged.
    """
    found = []
    for seed, scheme, regime in itertools.product(configuration.seeds, configuration.grid.schemes, configuration.grid.regimes):
        name = model_name(scheme, regime, seed)
        path = workspace.report(name) / "metrics.json"
        if path.exists():
            try:
                metrics = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error}); measure again with: dvc repro") from None
            found.append({"model": name, "scheme": scheme, "regime": regime, "seed": seed, **metrics})
    flagged = [flag["model"] for block in (transfer_files.read(workspace) or {"seeds": []})["seeds"] for flag in block["flags"]]
    for row in found:
        row |= {"transfer/flags": flagged.count(row["model"])} if row["model"] in flagged else {}
    return found


def to_csv(table: list[Row]) -> str:
    """The full table; a figure that a model does not have (threat model I of SL) is an empty cell."""
    names = list(dict.fromkeys(key for row in table for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue()


def cell(row: Row, metric: str) -> str:
    """`97.5 [95.3, 98.7]`: a percentage with its 95 % interval, or a dash. A `!` marks attacked figures of a model with flags."""
    if metric not in row:
        return "-"
    mark = " !" if _flagged(row) and metric not in NOT_ATTACKED else ""
    return f"{100 * row[metric]:.1f} [{100 * row[f'{metric}/low']:.1f}, {100 * row[f'{metric}/high']:.1f}]{mark}"


def _flagged(row: Row) -> bool:
    return bool(row.get("diagnostics/flags") or row.get("transfer/flags"))


def footnote(table: list[Row]) -> str:
    """What the mark says, or nothing where no figure bears it."""
    flagged = [row["model"] for row in table if _flagged(row)]
    return f"! diagnostics raised flags: see advml show {flagged[0]}" if flagged else ""


def to_markdown(table: list[Row]) -> str:
    """The table for a README: accuracies in percent with 95 % Wilson intervals."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {row['model']} | " + " | ".join(cell(row, metric) for metric in COLUMNS.values()) + " |" for row in table]
    note = footnote(table)
    return "\n".join(lines + ([f"\n{note}"] if note else [])) + "\n"
