"""Records of measurements: how a stage made its figures, and the figures. `records/<stage>/<MODEL>.json`.

`reports/<MODEL>/metrics.json` is put together from them, so each of the stages that measure a model may write it.
"""

from __future__ import annotations

from typing import Any

from advml.core.io import read_json, to_json, write_atomically
from advml.errors import UserError
from advml.paths import Workspace

MEASURING = ("evaluate", "represent")  # stages, in the order of their metrics


def write(workspace: Workspace, stage: str, record: dict[str, Any]) -> dict[str, float]:
    """Write a model's record, and its metrics.json anew; returns the latter.

    Args:
        record: `model`, `digest` (of the weights), `inputs` (fingerprint), `metrics` (flat), and whatever explains them.
    """
    path = workspace.record(stage, record["model"])
    write_atomically(path, to_json(record))
    return publish(workspace, record["model"], digest=record["digest"])


def publish(workspace: Workspace, model: str, *, digest: str) -> dict[str, float]:
    """Put a model's metrics.json together from its records; returns it. Also for records that are reused: a kill may have come between."""
    metrics = metrics_of(workspace, model, digest=digest)
    write_atomically(workspace.report(model) / "metrics.json", to_json(metrics))
    return metrics


def read(workspace: Workspace, stage: str, model: str) -> dict[str, Any] | None:
    """A model's record, or None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = workspace.record(stage, model)
    if not path.exists():
        return None
    record = read_json(path, needs=("model", "metrics"), remedy="measure again with: dvc repro")
    return record if record["model"] and isinstance(record["metrics"], dict) else None


def metrics_of(workspace: Workspace, model: str, *, digest: str) -> dict[str, float]:
    """All metrics measured on the weights with this sha256. What could not be measured is left out."""
    found = [read(workspace, stage, model) for stage in MEASURING]
    parts = [record["metrics"] for record in found if record and record.get("digest") == digest]
    return {name: value for part in parts for name, value in part.items() if value is not None}


def reusable(workspace: Workspace, stage: str, model: str, *, inputs: str) -> dict[str, Any] | None:
    """The record that the very same inputs have given, or None."""
    try:
        record = read(workspace, stage, model)
    except UserError:
        return None
    return record if record and record.get("inputs") == inputs else None
