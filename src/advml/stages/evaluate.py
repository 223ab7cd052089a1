"""`evaluate SCHEME REGIME`: clean and robust accuracy of one model on the test split, the only stage that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from advml import evaluation, models, tracking
from advml.checkpoint import Checkpoint, discard, write_atomically
from advml.paths import model_name
from advml.progress import Bar
from advml.regimes import REGIMES
from advml.schemes import SCHEMES
from advml.stages.context import Context


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, float]:
    """Write `reports/<MODEL>/metrics.json` and `records/evaluate/<MODEL>.json`; returns the metrics."""
    name = model_name(scheme, regime, seed)
    folder, made = context.workspace.model(name), context.workspace.record("evaluate", name)
    measured_file = context.workspace.report(name) / "metrics.json"
    record, network = models.read_record(folder), models.load(folder).to(context.machine.device, memory_format=torch.channels_last)
    discard(context.workspace.scratch(f"finetune-{name}"))  # its outputs are in use, so they are safe
    parameters = context.parameters("data", "temperature", "threat_model", "evaluate")
    inputs = context.fingerprint("evaluate", parameters, record["digest"], context.dataset.digest)
    if reuse and (done := _done(made, measured_file, inputs)):
        return done
    checkpoint = Checkpoint(context.workspace.scratch(f"evaluate-{name}"), inputs)
    head = "from pretraining; the encoder has changed since" if REGIMES[regime].encoder_learns else "from pretraining"
    measured = evaluation.figures(context.config, SCHEMES[scheme], note=f"projection head: {head}")
    results = _measure(context, name, network, measured, checkpoint)
    metrics = evaluation.metrics(results)
    described = {figure.name: evaluation.describe(figure, results[figure.name], context.config) for figure in measured}
    _write(measured_file, metrics)
    _write(made, {"model": name, "digest": record["digest"], "inputs": inputs, "figures": described})
    with tracking.attach_run(context.config, root=context.workspace.root, folder=folder) as run:
        run.log_metrics(metrics)
        run.log_file(made)
    return metrics


def _done(made: Path, measured_file: Path, inputs: str) -> dict[str, float] | None:
    """The metrics that the very same inputs have given, or None."""
    try:
        if json.loads(made.read_text(encoding="utf-8"))["inputs"] == inputs:
            return json.loads(measured_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        pass
    return None


def _measure(
    context: Context, name: str, network: models.Network, measured: list[evaluation.Figure], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Every figure's right images; figures that an interrupted process had finished are not measured again."""
    spec, split = context.config.evaluate, context.dataset.test
    done = checkpoint.folder / "figures.safetensors"
    try:
        results = load_file(done)
    except (FileNotFoundError, SafetensorError):
        results = {}
    with Bar(f"evaluate {name}", total=len(measured) * len(split.labels)) as bar:
        for number, figure in enumerate(measured):
            if figure.name not in results:
                results[figure.name] = evaluation.correct(
                    network,
                    split,
                    figure,
                    batch_size=spec.batch_size,
                    restarts=spec.restarts,
                    seed=spec.seed,
                    machine=context.machine,
                    on_batch=bar.advance,
                )
                write_atomically(done, save(results))
            bar.reach((number + 1) * len(split.labels), f"{figure.name} {results[figure.name].float().mean():.3f}")
    return {figure.name: results[figure.name] for figure in measured}  # in one order, wherever they come from


def _write(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
