"""`compare [MODELS]`: CKA between the layers of different models, on clean and on adversarial images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advml import tracking
from advml.data.class_order import few
from advml.errors import UserError
from advml.evaluation.records import to_json
from advml.figures.layers import Heatmap, heatmaps
from advml.figures.style import to_png
from advml.lines import tell
from advml.networks import models
from advml.networks.layout import place
from advml.paths import find_model
from advml.progress import Bar
from advml.runtime.checkpoint import write_atomically
from advml.similarity import compare, sources
from advml.similarity.represent import ESTIMATOR, KINDS, to_npz
from advml.stages.context import Context

NOBODY = "the grid has no two trained models that the paper compares"


def run(context: Context, *, chosen: tuple[str, ...] = (), out: Path | None = None) -> compare.Comparison | None:
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
    home = workspace.reports / "compare"
    out = out or home
    of_study = out.resolve() == home.resolve()
    if chosen and of_study:
        raise UserError(f"{home} holds the panels of the grid, which the report reads; give another --out")
    found = compare.all_pairs(list(folders)) if chosen else _grid_panels(context, folders)
    if not found:
        _nothing(out)
        if of_study:
            _write_json(workspace.record("compare", "panels"), {"digests": {}, "cka": None})
        return None
    if spec.source != sources.OWN and spec.source not in folders:  # a model of the grid that is in no panel
        folders[spec.source] = find_model(workspace, spec.source)
    records = {name: _checked(context, folder, strict=not chosen) for name, folder in folders.items()}
    networks = {name: _network(context, folder) for name, folder in folders.items()}
    with Bar(f"compare {len(networks)} models", total=3) as bar:
        bar.begin("adversarial images")
        about = (context.dataset, context.config, context.machine)
        attacked = {
            name: sources.adversarial_images(folder, records[name], networks[name], *about, anew=bool(chosen))
            for name, folder in folders.items()
        }
        seen, source = sources.shown(spec.source, attacked)
        bar.begin("similarity")
        compared = compare.compare(networks, seen, found, context.dataset.test, spec, context.machine)
        bar.begin("figures")
        described = {"estimator": ESTIMATOR, "gram": spec.gram, "n": sum(compared.similarity.sizes), "adversarial_source": source}
        described |= context.made_by({"similarity": spec.model_dump(mode="json")})
        described |= {"images_of": context.dataset.digest, "data": {name: record["data"]["digest"] for name, record in records.items()}}
        digest = _write(out, compared, described | compare.describe(compared))
    if of_study:
        record = {"digests": {name: record["digest"] for name, record in records.items()}, "cka": digest}
        _write_json(workspace.record("compare", "panels"), record)
    tracking.log_result(context.config, tracking.results.comparison(out), root=workspace.root)
    return compared


def _grid_panels(context: Context, folders: dict[str, Path]) -> list[compare.Panel]:
    """The paper's panels of all seeds whose models are trained; fills `folders`."""
    config, workspace = context.config, context.workspace
    wanted = [panel for seed in config.seeds for panel in compare.paper_panels(config.grid, seed)]
    found = [panel for panel in wanted if all((workspace.model(name) / "model.json").exists() for name in (panel.first, panel.second))]
    folders |= {name: workspace.model(name) for panel in found for name in (panel.first, panel.second)}
    return found


def _nothing(out: Path) -> None:
    """Say that there is nothing to compare, and take away what an earlier comparison has left."""
    for name in ("cka.npz", *(f"{kind}.png" for kind in KINDS)):
        (out / name).unlink(missing_ok=True)
    _write_json(out / "cka.json", {"panels": [], "reason": NOBODY})


def _checked(context: Context, folder: Path, *, strict: bool) -> dict[str, Any]:
    """model.json of a model that can be compared on the prepared data; `strict`: it must have been trained on them.

    Raises:
        UserError: it takes other images, tells other classes apart, or was trained on other data.
    """
    record, name, data = models.read_record(folder), folder.name, context.dataset
    ours, theirs = tuple(data.shape), tuple(record.get("input", ()))
    if theirs != ours:
        told = [" x ".join(str(side) for side in shape) for shape in (theirs, ours)]
        raise UserError(f"{name} takes {told[0]} images, data/prepared holds {told[1]}; compare models of one data set")
    if list(record.get("classes", ())) != list(data.classes):
        raise UserError(
            f"{name} tells {few(record['classes'])} apart, data/prepared holds {few(data.classes)}; compare models of one data set"
        )
    if (there := record["data"]["digest"]) != data.digest:
        told = f"{name} was trained on other data ({there[:16]}) than data/prepared holds ({data.digest[:16]})"
        if strict:
            raise UserError(f"{told}; run: dvc repro")
        tell(f"note: {told}: it may have learnt from these test images")
    return record


def _network(context: Context, folder: Path) -> models.Network:
    """The network, with the classifier that is attacked."""
    return place(models.load_classifier(folder), context.machine.device)


def _write(out: Path, compared: compare.Comparison, described: Mapping[str, Any]) -> str:
    """Write the files; returns the sha256 of cka.npz."""
    arrays = to_npz(compare.arrays(compared))
    write_atomically(out / "cka.npz", arrays)
    _write_json(out / "cka.json", described)
    for kind in KINDS:
        write_atomically(out / f"{kind}.png", to_png(_figure(compared, kind)))
    return hashlib.sha256(arrays).hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, to_json(content, indent=1))


def _figure(compared: compare.Comparison, kind: str) -> Any:
    names = {model: [layer.name for layer in rows] for (model, _), rows in compared.similarity.rows.items()}
    drawn = [
        Heatmap(compared.cka(panel, kind), panel.group, names[panel.first], names[panel.second], panel.first, panel.second)
        for panel in compared.panels
    ]
    return heatmaps(drawn, title=f"CKA between models, {kind} images", columns=min(3, len(drawn)))
