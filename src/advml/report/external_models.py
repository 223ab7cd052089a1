"""Models from elsewhere that `advml evaluate` has measured, beside those of the grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advml.core.io import read_json
from advml.core.paths import Workspace

NEEDS = ("model", "digest", "data_digest", "metrics", "figures")


def read(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Their records by name.

    Raises:
        UserError: a file is damaged.
    """
    found = {}
    for name, path in sorted(workspace.evaluations_of_given().items()):
        found[name] = read_json(path, needs=NEEDS, remedy=f"measure again with: advml evaluate, or remove {path}")
    return found


def of_data(records: Mapping[str, dict[str, Any]], digest: str) -> dict[str, dict[str, Any]]:
    """Those that were measured on the prepared data: figures of other images do not belong beside them."""
    return {name: record for name, record in records.items() if record["data_digest"] == digest}


def row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table, as `table.grid_rows` has them, and what the model was attacked with."""
    attacked = record["figures"].get("accuracy/worst_case", {})
    threat = {key: attacked[key] for key in ("norm", "epsilon") if key in attacked}
    metrics = {key: value for key, value in record["metrics"].items() if value is not None}
    return {"model": name, **threat, **metrics}
