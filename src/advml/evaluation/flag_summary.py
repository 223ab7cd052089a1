"""Names of a model's flags, from the record of its diagnostics and from a transfer. Does not import torch, for `tracking`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NONE, UNJUDGED = "none", "not judged"


def flag_summary(diagnostics: Mapping[str, Any], transferred: Iterable[Mapping[str, Any]] = ()) -> str:
    """Names of a model's flags; `none`, or `not judged` if the probes were not run.

    Args:
        diagnostics: the entry of that name in the record of `evaluate`.
        transferred: the model's entry in the result of `transfer_flags`.
    """
    flags = [flag["name"] for flag in (*diagnostics.get("flags", ()), *transferred)]
    return ", ".join(flags) or (NONE if "evidence" in diagnostics else UNJUDGED)


def transfer_flags(found: Mapping[str, Any] | None) -> dict[str, list[dict[str, str]]]:
    """Flags by model, from the result of `read_transfer`."""
    flags: dict[str, list[dict[str, str]]] = {}
    for block in (found or {"seeds": ()})["seeds"]:
        for flag in block["flags"]:
            flags.setdefault(flag["model"], []).append(flag)
    return flags
