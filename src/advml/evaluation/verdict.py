"""What speaks against a model's attacked figures, in a word: from the record of its diagnostics, and from a transfer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NONE, UNJUDGED = "none", "not judged"


def verdict(diagnostics: Mapping[str, Any], transferred: Iterable[Mapping[str, Any]] = ()) -> str:
    """Names of the flags, or that there are none, or that nobody looked.

    Args:
        diagnostics: of the record of `evaluate`.
        transferred: the model's flags of `transferred`.
    """
    flags = [flag["name"] for flag in (*diagnostics.get("flags", ()), *transferred)]
    return ", ".join(flags) or (NONE if "evidence" in diagnostics else UNJUDGED)


def transferred(found: Mapping[str, Any] | None) -> dict[str, list[dict[str, str]]]:
    """Flags by model, of a transfer as `transfer_files.read` gives it."""
    flags: dict[str, list[dict[str, str]]] = {}
    for block in (found or {"seeds": ()})["seeds"]:
        for flag in block["flags"]:
            flags.setdefault(flag["model"], []).append(flag)
    return flags
