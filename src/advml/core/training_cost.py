"""Cost of a model's training: gradient steps per image, and seconds.

Gradient steps follow from the settings, and are part of model.json. Seconds vary, and are kept in a file that is not an output of a
stage, because DVC would report equal weights as modified. A clone that pulls the models has no seconds; the table then shows a dash.
"""

from __future__ import annotations

from typing import Any

from advml.core.errors import UserError
from advml.core.io import read_json, to_json, write_atomically
from advml.core.paths import Workspace

STEPS, SECONDS = "cost/gradient_steps", "cost/seconds"


def write_seconds(workspace: Workspace, name: str, *, digest: str, seconds: float) -> None:
    """Store the training time of one phase, for weights with this sha256; epochs that were killed are not included."""
    write_atomically(workspace.report(name) / "seconds.json", to_json({"digest": digest, "seconds": round(seconds, 3)}))


def training_cost(workspace: Workspace, record: dict[str, Any]) -> dict[str, float]:
    """Metrics `cost/gradient_steps` and `cost/seconds`, summed over a model's phases; left out if unknown for one of them."""
    phases = [record, record["pretraining"]] if "pretraining" in record else [record]
    found = {STEPS: [one.get("gradient_steps") for one in phases], SECONDS: [_seconds(workspace, one) for one in phases]}
    return {key: sum(parts) for key, parts in found.items() if None not in parts}


def cost_of(workspace: Workspace, model: str) -> dict[str, float]:
    """Cost metrics of a model by name; empty if model.json is missing or damaged, which other commands report."""
    try:
        return training_cost(workspace, read_json(workspace.model(model) / "model.json", remedy="restore it with: dvc checkout"))
    except (UserError, OSError, TypeError, AttributeError):
        return {}


def _seconds(workspace: Workspace, phase: dict[str, Any]) -> float | None:
    """Seconds of a phase, if they were stored for the same weights; else None."""
    try:
        noted = read_json(workspace.report(phase["name"]) / "seconds.json", remedy="")
        return float(noted["seconds"]) if noted["digest"] == phase["digest"] else None
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
