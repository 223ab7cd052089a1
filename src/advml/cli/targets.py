"""Interpret the target of `evaluate` and `represent`: a scheme with a regime, or another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advml.core.errors import UserError
from advml.core.paths import Workspace, canonical
from advml.recipes import REGIMES, SCHEMES

SCHEME, FOLDER, FUNCTION, TIMM = "a scheme with a regime", "a trained model, by folder or name", "module:function", "a timm name"


def named(target: str, workspace: Workspace, *, imported: bool = True) -> str:
    """Complete a target: `cl` -> `CL`, `cl-at` -> `CL-AT-s0` if it exists, an imported model's name -> its folder; else unchanged."""
    if (workspace.model(canonical(target)) / "model.json").is_file() and not Path(target).exists():
        return canonical(target)
    if imported and (workspace.imported(target) / "model.json").is_file():
        return str(workspace.imported(target))
    return {name.lower(): name for name in SCHEMES}.get(target.lower(), target)


def kind_of(target: str, regime: str | None, workspace: Workspace) -> str:
    """Kind of a target: SCHEME, FOLDER, FUNCTION or TIMM.

    Raises:
        UserError: a scheme is given without a regime, or a regime without a scheme.
    """
    if regime is None and target in SCHEMES:
        raise UserError(f"{target}: a scheme needs a regime; choose from {', '.join(REGIMES)}")
    if regime is not None and target not in SCHEMES:
        raise UserError(f"{target} {regime}: a regime can only follow a scheme ({', '.join(SCHEMES)}); leave out {regime}")
    if regime:
        return SCHEME
    if any((folder / "model.json").is_file() for folder in (Path(target), workspace.model(target))):
        return FOLDER
    return FUNCTION if ":" in target else TIMM


def check_options(command: str, kind: str, options: Mapping[str, Sequence[str]], given: Mapping[str, Any]) -> None:
    """Raise UserError for an option that is given (not None) but not listed in `options` for this kind of target."""
    for option, value in given.items():
        if value is not None and option not in options[kind]:
            raise UserError(f"{command}: {option} has no meaning for {kind}, which takes {', '.join(options[kind])}; leave it out")


def of_grid(target: str, regime: str | None, seed: int | None, workspace: Workspace) -> dict[str, Any] | None:
    """Scheme, regime and seed of a model of this study, given by these, by its name or by its folder; None for other models."""
    from advml.pipeline.stages.evaluate import of_study

    return {"scheme": target, "regime": regime, "seed": seed or 0} if regime else of_study(workspace, target)
