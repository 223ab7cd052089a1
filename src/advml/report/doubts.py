"""What speaks against the figures of the study's models, and how they fare beyond the threat model: from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from advml.figures.robustness import corruption_matrix, security_curves


def flags(evaluated: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """All flags of all models: `model`, `name`, `saw`, `try`."""
    return [{"model": name, **flag} for name, record in evaluated.items() for flag in record.get("diagnostics", {}).get("flags", ())]


def curves(rows: Iterable[Mapping[str, Any]], evaluated: Mapping[str, Mapping[str, Any]], *, seed: int) -> Figure | None:
    """Security curves of a seed's models; None where diagnostics were off."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        evidence = evaluated.get(row["model"], {}).get("diagnostics", {}).get("evidence")
        if evidence and row["seed"] == seed:
            found.setdefault(row["scheme"], {})[row["regime"]] = evidence["curve"]
            threat = {"epsilon": evidence["epsilon"], "chance": 1 / evidence["classes"]}
    return security_curves(found, **threat) if found else None


def corruptions(rows: list[dict[str, Any]]) -> Figure | None:
    """Accuracy under each corruption; None where none was measured."""
    measured = [row for row in rows if "corruption/mean" in row]
    return corruption_matrix(measured) if measured else None
