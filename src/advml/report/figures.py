"""The figures of the page, from the files of the study's models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from matplotlib.figure import Figure

from advml.config import Grid
from advml.core.errors import UserError
from advml.core.io import read_json
from advml.core.paths import Workspace, model_name
from advml.evaluation import records
from advml.figures.curves import Curve, curve_grid
from advml.figures.layers import Heatmap, heatmaps
from advml.figures.robustness import corruption_matrix, security_curves
from advml.models.network import read_record
from advml.similarity import represent
from advml.similarity.compare import stored
from advml.similarity.represent import KINDS, MATRICES

# What speaks against the figures of the study's models, and how they fare beyond the threat model: from the records.


def flags(evaluated: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """All flags of all models: `model`, `name`, `saw`, `try`."""
    return [{"model": name, **flag} for name, record in evaluated.items() for flag in record.get("diagnostics", {}).get("flags", ())]


def unjudged(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Models that diagnostics have not seen, and why."""
    found = {name: record.get("diagnostics", {}) for name, record in evaluated.items() if record}
    return {name: about.get("skipped", "it was measured by an older version") for name, about in found.items() if "evidence" not in about}


def security(rows: Iterable[Mapping[str, Any]], evaluated: Mapping[str, Mapping[str, Any]], *, seed: int) -> Figure | None:
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


# The figures of the page, from the files of the study's models.


def matrices(grid: Grid, workspace: Workspace, name: str, *, seed: int) -> Figure | None:
    """One matrix (a key of MATRICES) of every model of a seed: a line per scheme, a column per regime. None without any."""
    panels = []
    for scheme in grid.schemes:
        for regime in grid.regimes:
            found = _read(workspace, model_name(scheme, regime, seed))
            panels.append(None if found is None else Heatmap(found[1][name], f"{scheme} {regime}", *[_names(found[0])] * 2))
    columns = len(grid.regimes)
    return heatmaps(panels, columns=columns, size=2.3) if any(panels) else None


def curves(grid: Grid, workspace: Workspace, *, seed: int) -> Figure | None:
    """Clean-adversarial CKA and probes of every layer of every model of a seed; None without any."""
    groups: dict[str, list[Curve]] = {}
    for scheme in grid.schemes:
        for regime in grid.regimes:
            found = _read(workspace, model_name(scheme, regime, seed))
            if found:
                groups.setdefault(scheme, []).append(_curve(regime, *found))
    return curve_grid(groups) if groups else None


def panels(workspace: Workspace) -> dict[str, Path]:
    """The figures that `compare` has drawn of the grid's present models, by kind of input; none if they are of others."""
    found = stored(workspace)
    if found is None or not all(is_of_model(workspace, name, digest) for name, digest in found.digests.items()):
        return {}
    paths = {kind: workspace.reports / "compare" / f"{kind}.png" for kind in KINDS}
    return {kind: path for kind, path in paths.items() if path.exists()}


def shown(workspace: Workspace) -> str:
    """Whose adversarial images the models of `compare` were shown, as it was recorded: each network's own, or a model's name."""
    found = stored(workspace)
    sources = {} if found is None else {name: about["model"] for name, about in found.described["adversarial_source"].items()}
    return (
        "each network's own"
        if all(name == source for name, source in sources.items())
        else f"those of {', '.join(sorted(set(sources.values())))}"
    )


def is_of_model(workspace: Workspace, name: str, digest: str | None) -> bool:
    """Whether these are the model's present weights; yes where the model is not here, as after a partial `dvc pull`."""
    folder = workspace.model(name)
    return not (folder / "model.json").exists() or read_record(folder).get("digest") == digest


def _curve(label: str, described: dict[str, Any], arrays: dict[str, np.ndarray]) -> Curve:
    probes = [layer["probe"]["accuracy"] for layer in described["layers"]]
    diagonal = np.diagonal(arrays["clean_adversarial"])
    return Curve(label, _names(described), diagonal, *([probe[kind] for probe in probes] for kind in ("clean", "adversarial")))


def _names(described: dict[str, Any]) -> Sequence[str]:
    return [layer["name"] for layer in described["layers"]]


def _read(workspace: Workspace, model: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """cka.json and the matrices of a model; None if its present weights have not been measured."""
    folder, record = workspace.report(model), records.read(workspace, "represent", model)
    if record is None or not is_of_model(workspace, model, record.get("digest")):
        return None
    try:
        described = read_json(folder / "cka.json", needs=("layers",), remedy="measure again with: dvc repro")
        with np.load(represent.content(folder / "cka.npz", digest=record.get("cka")), allow_pickle=False) as stored:
            return described, {name: stored[name] for name in MATRICES}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{folder} is damaged ({error}); measure again with: dvc repro") from None
