"""What `evaluate` and `represent` are asked to measure: a scheme with a regime, or a model from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advml.core.errors import UserError
from advml.core.paths import Workspace, canonical
from advml.recipes import REGIMES, SCHEMES

SCHEME, FOLDER, FUNCTION, TIMM = "a scheme with a regime", "a trained model, by folder or name", "module:function", "a timm name"


def named(target: str, workspace: Workspace, *, imported: bool = True) -> str:
    """`cl` -> `CL`, `cl-at` -> `CL-AT-s0` where there is such a model, the name of an imported one -> its folder; else as it is."""
    if (workspace.model(canonical(target)) / "model.json").is_file() and not Path(target).exists():
        return canonical(target)
    if imported and (workspace.imported(target) / "model.json").is_file():
        return str(workspace.imported(target))
    return {name.lower(): name for name in SCHEMES}.get(target.lower(), target)


def kind_of(target: str, regime: str | None, workspace: Workspace) -> str:
    """SCHEME, FOLDER, FUNCTION or TIMM.

    Raises:
        UserError: a scheme without a regime, or a regime without a scheme.
    """
    if regime is None and target in SCHEMES:
        raise UserError(f"{target}: which regime? Choose from {', '.join(REGIMES)}")
    if regime is not None and target not in SCHEMES:
        raise UserError(f"{target} {regime}: a regime goes with {', '.join(SCHEMES)}; leave out {regime}")
    if regime:
        return SCHEME
    if any((folder / "model.json").is_file() for folder in (Path(target), workspace.model(target))):
        return FOLDER
    return FUNCTION if ":" in target else TIMM


def check_options(command: str, kind: str, options: Mapping[str, Sequence[str]], given: Mapping[str, Any]) -> None:
    """Raises UserError for an option that is given (not None) and that `options` does not list for this kind of target."""
    for option, value in given.items():
        if value is not None and option not in options[kind]:
            raise UserError(f"{command}: {option} has no meaning for {kind}, which takes {', '.join(options[kind])}; leave it out")


def of_grid(target: str, regime: str | None, seed: int | None, workspace: Workspace) -> dict[str, Any] | None:
    """Scheme, regime and seed of a model of this study, named by them, by its name or its folder; None if it is none."""
    from advml.pipeline.stages.evaluate import of_study

    return {"scheme": target, "regime": regime, "seed": seed or 0} if regime else of_study(workspace, target)
