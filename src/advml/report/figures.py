"""Figures of the HTML page, from the files of the study's models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from matplotlib.figure import Figure

from advml.config import Grid
from advml.core.io import read_json, reporting_damage
from advml.core.paths import Workspace, model_name
from advml.evaluation import records
from advml.figures.curves import Curve, curve_grid
from advml.figures.layers import Heatmap, heatmaps
from advml.figures.robustness import corruption_matrix, security_curves
from advml.models.network import read_record
from advml.similarity import represent
from advml.similarity.compare import stored
from advml.similarity.represent import KINDS, MATRICES
from advml.similarity.trust import table


def flags(evaluated: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """All flags of all models: `model`, `name`, `saw`, `try`."""
    return [{"model": name, **flag} for name, record in evaluated.items() for flag in record.get("diagnostics", {}).get("flags", ())]


def unjudged(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Models without diagnostics -> the reason."""
    found = {name: record.get("diagnostics", {}) for name, record in evaluated.items() if record}
    return {name: about.get("skipped", "it was measured by an older version") for name, about in found.items() if "evidence" not in about}


def security(rows: Iterable[Mapping[str, Any]], evaluated: Mapping[str, Mapping[str, Any]], *, seed: int) -> Figure | None:
    """Security curves of a seed's models, by PGD and (if measured) by minimal distances; None if there were no diagnostics."""
    found: dict[str, dict[str, Any]] = {}
    nearest: dict[str, dict[str, Any]] = {}
    about: dict[str, Any] = {}
    for row in rows:
        seen = evaluated.get(row["model"], {}).get("diagnostics", {})
        evidence, minimal = seen.get("evidence"), seen.get("minimal")
        if evidence and row["seed"] == seed:
            found.setdefault(row["scheme"], {})[row["regime"]] = evidence["curve"]
            # Chance as in `curve_above_chance`; older records lack largest_class
            about |= {"epsilon": evidence["epsilon"], "chance": max(1 / evidence["classes"], evidence.get("largest_class", 0))}
            if minimal:
                nearest.setdefault(row["scheme"], {})[row["regime"]] = minimal["curve"]
                about |= {"attack": minimal["attack"].upper()}
    return security_curves(found, nearest=nearest, **about) if found else None


def corruptions(rows: list[dict[str, Any]]) -> Figure | None:
    """Figure of the accuracy under each corruption; None if none was measured."""
    measured = [row for row in rows if "corruption/mean" in row]
    return corruption_matrix(measured) if measured else None


def matrices(grid: Grid, workspace: Workspace, name: str, *, seed: int) -> Figure | None:
    """Heatmaps of one matrix (a key of MATRICES) for every model of a seed: rows are schemes, columns regimes; None if there are none."""
    panels, (rows, columns) = [], MATRICES[name]
    for scheme in grid.schemes:
        for regime in grid.regimes:
            found = _read(workspace, model_name(scheme, regime, seed))
            left, below = regime == grid.regimes[0], scheme == grid.schemes[-1]  # only axes at the edge of the grid are labelled
            labels = f"layer, {rows} images" if left else "", f"layer, {columns} images" if below else ""
            panels.append(None if found is None else Heatmap(found[1][name], f"{scheme} {regime}", *[_names(found[0])] * 2, *labels))
    return heatmaps(panels, columns=len(grid.regimes), size=2.3) if any(panels) else None


def curves(grid: Grid, workspace: Workspace, *, seed: int) -> Figure | None:
    """Curves of clean-adversarial CKA and probes over the layers of every model of a seed; None if there are none."""
    groups: dict[str, list[Curve]] = {}
    for scheme in grid.schemes:
        for regime in grid.regimes:
            found = _read(workspace, model_name(scheme, regime, seed))
            if found:
                groups.setdefault(scheme, []).append(_curve(regime, *found))
    return curve_grid(groups) if groups else None


def panels(workspace: Workspace) -> dict[str, Path]:
    """Files of `compare`'s figures by kind of input, and `map`; empty if they were made with other weights than the grid's models have."""
    found = stored(workspace)
    if found is None or not all(is_of_model(workspace, name, digest) for name, digest in found.digests.items()):
        return {}
    paths = {kind: workspace.reports / "compare" / f"{kind}.png" for kind in (*KINDS, "map")}
    return {kind: path for kind, path in paths.items() if path.exists()}


def shown(workspace: Workspace) -> str:
    """Description of the adversarial images that `compare` has used: each network's own, or those of named models."""
    found = stored(workspace)
    sources = {} if found is None else {name: about["model"] for name, about in found.described["adversarial_source"].items()}
    return (
        "each network's own"
        if all(name == source for name, source in sources.items())
        else f"those of {', '.join(sorted(set(sources.values())))}"
    )


def trust(workspace: Workspace, digest: str) -> dict[str, Any] | None:
    """Result of `advml trust` on these data; None if there is none."""
    path = workspace.record("trust", "measures")
    found = read_json(path, needs=("scores", "orders", "data"), remedy="measure again with: advml trust") if path.exists() else None
    return found | {"table": table(found["scores"])} if found and found["data"] == digest else None


def is_of_model(workspace: Workspace, name: str, digest: str | None) -> bool:
    """Whether a digest is that of the model's present weights; True if the model is not on disk, as after a partial `dvc pull`."""
    folder = workspace.model(name)
    return not (folder / "model.json").exists() or read_record(folder).get("digest") == digest


def _curve(label: str, described: dict[str, Any], arrays: dict[str, np.ndarray]) -> Curve:
    probes = [layer["probe"]["accuracy"] for layer in described["layers"]]
    diagonal = np.diagonal(arrays["clean_adversarial"])
    return Curve(label, _names(described), diagonal, *([probe[kind] for probe in probes] for kind in ("clean", "adversarial")))


def _names(described: dict[str, Any]) -> Sequence[str]:
    return [layer["name"] for layer in described["layers"]]


def _read(workspace: Workspace, model: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read cka.json and the matrices of a model; None if its present weights have not been measured."""
    folder, record = workspace.report(model), records.read(workspace, "represent", model)
    if record is None or not is_of_model(workspace, model, record.get("digest")):
        return None
    with reporting_damage(folder, remedy="measure again with: dvc repro", errors=(BadZipFile,)):
        described = read_json(folder / "cka.json", needs=("layers",), remedy="measure again with: dvc repro")
        with np.load(represent.content(folder / "cka.npz", digest=record.get("cka")), allow_pickle=False) as stored:
            return described, {name: stored[name] for name in MATRICES}
