"""Stage `represent SCHEME REGIME`: CKA between a model's layers on clean and adversarial images, scalars, linear probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from advml import tracking
from advml.core.io import sha256, to_json, write_atomically
from advml.core.paths import model_name
from advml.core.progress import Bar
from advml.data import adversarial
from advml.data.adversarial import AdversarialImages
from advml.evaluation import records
from advml.figures.curves import layer_curves
from advml.figures.layers import Heatmap, heatmaps
from advml.figures.style import to_png
from advml.models.network import Network
from advml.pipeline.context import Context
from advml.similarity import represent
from advml.similarity.represent import to_npz


def run(context: Context, *, scheme: str, regime: str, seed: int) -> dict[str, float]:
    """Write `cka.npz`, `cka.json` and the figures in `reports/<MODEL>/`, the record and metrics.json; returns the metrics."""
    name = model_name(scheme, regime, seed)
    workspace, folder = context.workspace, context.workspace.model(name)
    record, network = context.load_network(folder)
    metrics = measure(context, name, record["digest"], network, adversarial.read(workspace.adversarial(name), digest=record["digest"]))
    tracking.log_folder(context.tracking, folder)
    return metrics


def measure(context: Context, name: str, weights: str, network: Network, attacked: AdversarialImages) -> dict[str, float]:
    """Measure one model, whose weights have this sha256, and write its files; returns the metrics."""
    workspace, spec = context.workspace, context.config.similarity
    inputs = context.fingerprint("represent", context.parameters("similarity"), weights, context.dataset.digest, attacked.record)
    of = {"model": name, "digest": weights}
    with Bar(f"represent {name}", total=len(represent.PARTS) + 1) as bar:
        measured = represent.represent(network, context.dataset, attacked.images, spec, context.machine, on_part=bar.begin)
        bar.begin("figures")
        described = represent.describe(measured, spec, of=of, attack=attacked.record)
        cka = _write(workspace.report(name), measured, described, chance=1 / len(context.dataset.classes))
    measures = represent.metrics(measured)
    record = of | {"data": context.dataset.digest, "inputs": inputs, "cka": cka, "metrics": measures}
    record |= {"parameters": context.parameters("similarity")}
    return records.write(workspace, "represent", record | {"how": {key: described[key] for key in represent.HOW if key in described}})


def _write(folder: Path, measured: represent.Representation, described: dict[str, object], *, chance: float) -> str:
    """Write the files of one model; returns the sha256 of cka.npz."""
    arrays, names = to_npz(represent.arrays(measured)), [layer.name for layer in measured.layers]
    write_atomically(folder / "cka.npz", arrays)
    write_atomically(folder / "cka.json", to_json(described, indent=1))
    panels = [
        Heatmap(measured.cka(*pair), f"{pair[0]} with {pair[1]}", names, names, *(kind if pair[0] != pair[1] else "" for kind in pair))
        for pair in represent.MATRICES.values()
    ]
    write_atomically(folder / "cka.png", to_png(heatmaps(panels, title=f"{folder.name}: CKA between layers")))
    curves = layer_curves(
        names,
        np.diagonal(measured.cka("clean", "adversarial")),
        {kind: [probe.accuracy[kind] for probe in measured.probes] for kind in represent.KINDS},
        title=folder.name,
        chance=chance,
    )
    write_atomically(folder / "layers.png", to_png(curves))
    return sha256(arrays)
