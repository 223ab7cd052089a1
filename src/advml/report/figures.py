"""The figures of the page, from the files of the study's models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from advml.config import Config
from advml.errors import UserError
from advml.figures.layers import Curve, Heatmap, curve_grid, heatmaps
from advml.paths import Workspace, model_name
from advml.similarity.representation import MATRICES


def matrices(config: Config, workspace: Workspace, name: str, *, seed: int) -> Figure | None:
    """One matrix (a key of MATRICES) of every model of a seed: a line per scheme, a column per regime. None without any."""
    panels = []
    for scheme in config.grid.schemes:
        for regime in config.grid.regimes:
            found = _read(workspace, model_name(scheme, regime, seed))
            panels.append(None if found is None else Heatmap(found[1][name], f"{scheme} {regime}", *[_names(found[0])] * 2))
    columns = len(config.grid.regimes)
    return heatmaps(panels, columns=columns, size=2.3) if any(panels) else None


def curves(config: Config, workspace: Workspace, *, seed: int) -> Figure | None:
    """Clean-adversarial CKA and probes of every layer of every model of a seed; None without any."""
    groups: dict[str, list[Curve]] = {}
    for scheme in config.grid.schemes:
        for regime in config.grid.regimes:
            found = _read(workspace, model_name(scheme, regime, seed))
            if found:
                groups.setdefault(scheme, []).append(_curve(regime, *found))
    return curve_grid(groups) if groups else None


def _curve(label: str, described: dict[str, Any], arrays: dict[str, np.ndarray]) -> Curve:
    probes = [layer["probe"]["accuracy"] for layer in described["layers"]]
    diagonal = np.diagonal(arrays["clean_adversarial"])
    return Curve(label, _names(described), diagonal, *([probe[kind] for probe in probes] for kind in ("clean", "adversarial")))


def _names(described: dict[str, Any]) -> Sequence[str]:
    return [layer["name"] for layer in described["layers"]]


def _read(workspace: Workspace, model: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """cka.json and the matrices of a model; None if it has not been measured."""
    folder = workspace.report(model)
    if not workspace.record("represent", model).exists():
        return None
    try:
        described = json.loads(Path(folder / "cka.json").read_text(encoding="utf-8"))
        with np.load(folder / "cka.npz", allow_pickle=False) as stored:
            return described, {name: stored[name] for name in MATRICES}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}); measure again with: dvc repro") from None
