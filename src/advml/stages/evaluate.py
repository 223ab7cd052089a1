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
from advml.progress import Progress
from advml.regimes import REGIMES
from advml.schemes import SCHEMES
from advml.stages.context import Context


def run(context: Context, *, scheme: str, regime: str, seed: int) -> dict[str, float]:
    """Write `reports/<MODEL>/metrics.json` and `evaluation.json`; returns the metrics."""
    name = model_name(scheme, regime, seed)
    folder, report = context.workspace.model(name), context.workspace.report(name)
    record, network = models.read_record(folder), models.load(folder).to(context.machine.device, memory_format=torch.channels_last)
    discard(context.workspace.scratch(f"finetune-{name}"))  # its outputs are in use, so they are safe
    parameters = context.parameters("data", "temperature", "threat_model", "evaluate")
    inputs = context.fingerprint("evaluate", parameters, record["digest"], context.dataset.digest)
    checkpoint = Checkpoint(context.workspace.scratch(f"evaluate-{name}"), inputs)
    head = "from pretraining; the encoder has changed since" if REGIMES[regime].encoder_learns else "from pretraining"
    measured = evaluation.figures(context.config, SCHEMES[scheme], note=f"projection head: {head}")
    results = _measure(context, name, network, measured, checkpoint)
    metrics = evaluation.metrics(results)
    described = {figure.name: evaluation.describe(figure, results[figure.name], context.config) for figure in measured}
    _write(report / "metrics.json", metrics)
    _write(report / "evaluation.json", {"model": name, "digest": record["digest"], "inputs": inputs, "figures": described})
    tracking.log_evaluation(context.config, root=context.workspace.root, record=record, metrics=metrics, report=report)
    return metrics


def _measure(context: Context, name: str, network: models.Network, measured: list[evaluation.Figure], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every figure's right images; figures that an interrupted process had finished are not measured again."""
    spec, split = context.config.evaluate, context.dataset.test
    done = checkpoint.folder / "figures.safetensors"
    try:
        results = load_file(done)
    except (FileNotFoundError, SafetensorError):
        results = {}
    with Progress(f"evaluate {name}", total=len(measured) * len(split.labels)) as bar:
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
    return results


def _write(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
