"""Names of a model's flags, from the record of its diagnostics and from a transfer. Torch-free, as tracking reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NONE, UNJUDGED = "none", "not judged"


def flag_summary(diagnostics: Mapping[str, Any], transferred: Iterable[Mapping[str, Any]] = ()) -> str:
    """Names of the flags; `none`, or `not judged` where the probes were not run.

    Args:
        diagnostics: of the record of `evaluate`.
        transferred: the model's flags of `transfer_flags`.
    """
    flags = [flag["name"] for flag in (*diagnostics.get("flags", ()), *transferred)]
    return ", ".join(flags) or (NONE if "evidence" in diagnostics else UNJUDGED)


def transfer_flags(found: Mapping[str, Any] | None) -> dict[str, list[dict[str, str]]]:
    """Flags by model, of a transfer as `read_transfer` gives it."""
    flags: dict[str, list[dict[str, str]]] = {}
    for block in (found or {"seeds": ()})["seeds"]:
        for flag in block["flags"]:
            flags.setdefault(flag["model"], []).append(flag)
    return flags
