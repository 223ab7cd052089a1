"""What a model's training took: gradient steps per image, which follow from the settings, and seconds, which do not.

Gradient steps are part of model.json. Seconds lie in a file of their own that is no output of a stage: DVC would call the same weights
modified because they took a second more. A clone that pulls the models has no seconds; the table shows a dash.
"""

from __future__ import annotations

from typing import Any

from advml.core.errors import UserError
from advml.core.io import read_json, to_json, write_atomically
from advml.core.paths import Workspace

STEPS, SECONDS = "cost/gradient_steps", "cost/seconds"


def write_seconds(workspace: Workspace, name: str, *, digest: str, seconds: float) -> None:
    """Note how long the epochs of one phase took, until its weights, with this sha256, were made; a killed epoch does not count."""
    write_atomically(workspace.report(name) / "seconds.json", to_json({"digest": digest, "seconds": round(seconds, 3)}))


def training_cost(workspace: Workspace, record: dict[str, Any]) -> dict[str, float]:
    """`cost/gradient_steps` and `cost/seconds` of all phases behind a model.json; what is not known of every one of them is left out."""
    phases = [record, record["pretraining"]] if "pretraining" in record else [record]
    found = {STEPS: [one.get("gradient_steps") for one in phases], SECONDS: [_seconds(workspace, one) for one in phases]}
    return {key: sum(parts) for key, parts in found.items() if None not in parts}


def cost_of(workspace: Workspace, model: str) -> dict[str, float]:
    """The same of a model's name; nothing where its model.json is missing or damaged, which other commands say."""
    try:
        return training_cost(workspace, read_json(workspace.model(model) / "model.json", remedy="restore it with: dvc checkout"))
    except (UserError, OSError, TypeError, AttributeError):
        return {}


def _seconds(workspace: Workspace, phase: dict[str, Any]) -> float | None:
    """Of the weights that are meant, not of others of that name."""
    try:
        noted = read_json(workspace.report(phase["name"]) / "seconds.json", remedy="")
        return float(noted["seconds"]) if noted["digest"] == phase["digest"] else None
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
