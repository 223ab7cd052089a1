"""Marks beside figures that must not be taken as they stand, the same in tables and charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLAGGED, UNJUDGED = "!", "?"
MEANING = {FLAGGED: "diagnostics raised flags", UNJUDGED: "not judged by diagnostics"}


def mark(row: Mapping[str, Any]) -> str:
    """`!` for a model with flags, `?` for an attacked one that diagnostics have not seen, else nothing.

    Args:
        row: a model's flat metrics.
    """
    if row.get("diagnostics/flags") or row.get("transfer/flags"):
        return FLAGGED
    return UNJUDGED if "accuracy/worst_case" in row and "diagnostics/flags" not in row else ""
