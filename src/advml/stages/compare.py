"""`compare [MODELS]`: CKA between the layers of different models, on clean and on adversarial images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advml import tracking
from advml.data import adversarial
from advml.errors import UserError
from advml.evaluation import accuracy
from advml.figures.layers import Heatmap, heatmaps
from advml.figures.style import to_png
from advml.networks import models
from advml.paths import Workspace, find_model
from advml.progress import Bar
from advml.runtime.checkpoint import write_atomically
from advml.similarity import comparison
from advml.similarity.arrays import to_npz
from advml.similarity.representation import ESTIMATOR, KINDS
from advml.stages.context import Context
from advml.training.schemes import SCHEMES

OWN = "own"


def run(context: Context, *, chosen: tuple[str, ...] = (), out: Path | None = None) -> comparison.Comparison | None:
    """Write `cka.npz`, `cka.json` and a figure per kind of input into `out`; returns what was measured.

    A grid without two models to compare is no mistake: then `cka.json` says so, and the result is None.

    Args:
        chosen: names or folders of models, to be compared with one another; none: the panels of the paper.
        out: None: `reports/compare`, which the report reads.
    """
    workspace, spec = context.workspace, context.config.similarity
    folders = {folder.name: folder for folder in (find_model(workspace, model) for model in chosen)}
    if chosen and (len(folders) < 2 or len(folders) < len(chosen)):
        raise UserError("compare needs at least two models with different names")
    panels = comparison.all_pairs(list(folders)) if chosen else _grid_panels(context, folders)
    out = out or workspace.reports / "compare"
    if not panels:
        _write_json(out / "cka.json", {"panels": [], "reason": "the grid has no two trained models that the paper compares"})
        _write_json(workspace.record("compare", "panels"), {"digests": {}, "cka": None})
        return None
    networks = {name: models.load(folder).to(context.machine.device, memory_format=torch.channels_last) for name, folder in folders.items()}
    for name, network in networks.items():
        _check(context, name, network)
    with Bar(f"compare {len(networks)} models", total=2) as bar:
        bar.advance(1, "adversarial images")
        attacked = {name: _attacked(context, folder, networks[name]) for name, folder in folders.items()}
        seen, source = _sources(spec.source, attacked)
        bar.advance(1, "similarity")
        compared = comparison.compare(networks, seen, panels, context.dataset.test, spec, context.machine)
    described = {"estimator": ESTIMATOR, "gram": spec.gram, "n": sum(compared.similarity.sizes), "adversarial_source": source}
    described |= comparison.describe(compared)
    digest = _write(out, compared, described)
    if not chosen:
        record = {"digests": {name: models.read_record(folder)["digest"] for name, folder in folders.items()}, "cka": digest}
        _write_json(workspace.record("compare", "panels"), record)
    _log(context, out, compared)
    return compared


def _grid_panels(context: Context, folders: dict[str, Path]) -> list[comparison.Panel]:
    """The paper's panels of all seeds whose models are trained; fills `folders`."""
    config, workspace = context.config, context.workspace
    wanted = [panel for seed in config.seeds for panel in comparison.paper_panels(config.grid, seed)]
    panels = [panel for panel in wanted if all((workspace.model(name) / "model.json").exists() for name in (panel.first, panel.second))]
    folders |= {name: workspace.model(name) for panel in panels for name in (panel.first, panel.second)}
    return panels


def _check(context: Context, name: str, network: models.Network) -> None:
    a, (channels, size, _) = network.architecture, context.dataset.shape
    if (a.channels, a.image_size) != (channels, size):
        raise UserError(
            f"{name} takes {a.channels} x {a.image_size} x {a.image_size} images, data/prepared holds {channels} x {size} x {size}; "
            "compare models of one data set"
        )


def _attacked(context: Context, folder: Path, network: models.Network) -> adversarial.AdversarialImages:
    """What `evaluate` has stored beside the model, or the same attack now."""
    record = models.read_record(folder)
    home = Workspace(folder.resolve().parents[2])
    if record["data"]["digest"] == context.dataset.digest and home.adversarial(folder.name).exists():
        return adversarial.read(home.adversarial(folder.name), digest=record["digest"])
    images, attack = accuracy.attacked(network, context.dataset.test, context.config, SCHEMES[record["scheme"]], context.machine)
    return adversarial.AdversarialImages(images, {"model": folder.name, "digest": record["digest"]} | attack)


def _sources(source: str, attacked: Mapping[str, adversarial.AdversarialImages]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Which adversarial images each model sees, and how they were made."""
    if source != OWN and source not in attacked:
        raise UserError(f"similarity.source = {source!r}; choose from {', '.join((OWN, *attacked))}")
    chosen = {name: attacked[name if source == OWN else source] for name in attacked}
    return {name: found.images for name, found in chosen.items()}, {name: found.record for name, found in chosen.items()}


def _write(out: Path, compared: comparison.Comparison, described: Mapping[str, Any]) -> str:
    """Write the files; returns the sha256 of cka.npz."""
    arrays = to_npz(comparison.arrays(compared))
    write_atomically(out / "cka.npz", arrays)
    _write_json(out / "cka.json", described)
    for kind in KINDS:
        write_atomically(out / f"{kind}.png", to_png(_figure(compared, kind)))
    return hashlib.sha256(arrays).hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _figure(compared: comparison.Comparison, kind: str) -> Any:
    names = {model: [layer.name for layer in rows] for (model, _), rows in compared.similarity.rows.items()}
    drawn = [
        Heatmap(compared.cka(panel, kind), panel.group, names[panel.first], names[panel.second], panel.first, panel.second)
        for panel in compared.panels
    ]
    return heatmaps(drawn, title=f"CKA between models, {kind} images", columns=min(3, len(drawn)))


def _log(context: Context, out: Path, compared: comparison.Comparison) -> None:
    params = {"similarity": context.config.similarity.model_dump(mode="json")}
    with tracking.open_run(context.config, root=context.workspace.root, name=out.name, kind="comparison", tags={}, params=params) as run:
        for file in ("cka.npz", "cka.json", *(f"{kind}.png" for kind in KINDS)):
            run.log_file(out / file, "cka")
        for kind in KINDS:
            run.log_image(out / f"{kind}.png", key=f"compare-{kind}")
