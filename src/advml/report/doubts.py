"""What speaks against the figures of the study's models, and how they fare beyond the threat model: from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from advml.figures.robustness import corruption_matrix, security_curves


def flags(evaluated: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """All flags of all models: `model`, `name`, `saw`, `try`."""
    return [{"model": name, **flag} for name, record in evaluated.items() for flag in record.get("diagnostics", {}).get("flags", ())]


def unjudged(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Models that diagnostics have not seen, and why."""
    found = {name: record.get("diagnostics", {}) for name, record in evaluated.items() if record}
    return {name: about.get("skipped", "it was measured by an older version") for name, about in found.items() if "evidence" not in about}


def curves(rows: Iterable[Mapping[str, Any]], evaluated: Mapping[str, Mapping[str, Any]], *, seed: int) -> Figure | None:
    """Security curves of a seed's models, by PGD and by minimal distances where there are any; None where diagnostics were off."""
    found: dict[str, dict[str, Any]] = {}
    nearest: dict[str, dict[str, Any]] = {}
    about: dict[str, Any] = {}
    for row in rows:
        seen = evaluated.get(row["model"], {}).get("diagnostics", {})
        evidence, minimal = seen.get("evidence"), seen.get("minimal")
        if evidence and row["seed"] == seed:
            found.setdefault(row["scheme"], {})[row["regime"]] = evidence["curve"]
            guessing = max(1 / evidence["classes"], evidence.get("largest_class", 0))  # the rule's; older records lack the second
            about |= {"epsilon": evidence["epsilon"], "chance": guessing}
            if minimal:
                nearest.setdefault(row["scheme"], {})[row["regime"]] = minimal["curve"]
                about |= {"attack": minimal["attack"].upper()}
    return security_curves(found, nearest=nearest, **about) if found else None


def corruptions(rows: list[dict[str, Any]]) -> Figure | None:
    """Accuracy under each corruption; None where none was measured."""
    measured = [row for row in rows if "corruption/mean" in row]
    return corruption_matrix(measured) if measured else None
