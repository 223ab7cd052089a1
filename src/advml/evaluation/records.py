"""Records of measurements: how a stage made its figures, and the figures. `records/<stage>/<MODEL>.json`.

`reports/<MODEL>/metrics.json` is put together from them, so each of the stages that measure a model may write it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from advml.errors import UserError
from advml.paths import Workspace
from advml.runtime.checkpoint import write_atomically

MEASURING = ("evaluate", "represent")  # stages, in the order of their metrics


def write(workspace: Workspace, stage: str, record: dict[str, Any]) -> dict[str, float]:
    """Write a model's record, and its metrics.json anew; returns the latter.

    Args:
        record: `model`, `digest` (of the weights), `inputs` (fingerprint), `metrics` (flat), and whatever explains them.
    """
    path = workspace.record(stage, record["model"])
    write_atomically(path, to_json(record))
    return publish(workspace, record["model"], digest=record["digest"])


def to_json(content: Mapping[str, Any], *, indent: int = 2) -> bytes:
    """A result as the text of its file. JSON has no NaN and no infinity: what could not be measured is null."""
    return (json.dumps(_without_nan(content), indent=indent, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["model"] and isinstance(record["metrics"], dict) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); measure again with: dvc repro") from None


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
