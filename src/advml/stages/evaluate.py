"""`evaluate SCHEME REGIME`: clean and robust accuracy of one model on the test split."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from advml import tracking
from advml.data import adversarial
from advml.evaluation import accuracy, records
from advml.networks import models
from advml.paths import model_name
from advml.progress import Bar
from advml.runtime.checkpoint import Checkpoint, discard, write_atomically
from advml.stages.context import Context
from advml.training.regimes import REGIMES
from advml.training.schemes import SCHEMES

KEPT = "adversarial images"  # their place among the figures of an unfinished evaluation


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, float]:
    """Write the model's record, metrics and adversarial test images; returns the metrics."""
    name = model_name(scheme, regime, seed)
    workspace, folder = context.workspace, context.workspace.model(name)
    record, network = context.load_network(folder)
    discard(workspace.scratch(f"finetune-{name}"))  # its outputs are in use, so they are safe
    parameters = context.parameters("data", "temperature", "threat_model", "evaluate")
    inputs = context.fingerprint("evaluate", parameters, record["digest"], context.dataset.digest)
    if reuse and workspace.adversarial(name).exists() and records.reusable(workspace, "evaluate", name, inputs=inputs):
        return records.publish(workspace, name, digest=record["digest"])
    head = "from pretraining; the encoder has changed since" if REGIMES[regime].encoder_learns else "from pretraining"
    measured = accuracy.figures(context.config, SCHEMES[scheme], note=f"projection head: {head}")
    results = _measure(context, name, network, measured, Checkpoint(workspace.scratch(f"evaluate-{name}"), inputs))
    described = {figure.name: accuracy.describe(figure, results[figure.name], context.config) for figure in measured}
    of = {"model": name, "digest": record["digest"]}
    (kept,) = (described[figure.name] for figure in measured if figure.kept)
    adversarial.write(adversarial.AdversarialImages(results.pop(KEPT), of | kept), workspace.adversarial(name))
    measures = accuracy.metrics(results)
    metrics = records.write(workspace, "evaluate", of | {"inputs": inputs, "metrics": measures, "figures": described})
    with tracking.attach_run(context.config, root=workspace.root, folder=folder) as run:
        run.log_params(context.parameters("threat_model", "evaluate"))
        run.log_metrics(measures)
        run.log_file(workspace.record("evaluate", name), "records/evaluate")
    return metrics


def _measure(
    context: Context, name: str, network: models.Network, measured: list[accuracy.Figure], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Every figure's right images, and KEPT; figures that an interrupted process had finished are not measured again."""
    spec, split = context.config.evaluate, context.dataset.test
    done = checkpoint.folder / "figures.safetensors"
    try:
        results = load_file(done)
    except (FileNotFoundError, SafetensorError):
        results = {}
    with Bar(f"evaluate {name}", total=len(measured) * len(split.labels)) as bar:
        for number, figure in enumerate(measured):
            if figure.name not in results:
                keep = accuracy.Keep(spec.adversarial_images) if figure.kept else None
                results[figure.name] = accuracy.correct(
                    network,
                    split,
                    figure,
                    batch_size=spec.batch_size,
                    restarts=spec.restarts,
                    seed=spec.seed,
                    machine=context.machine,
                    on_batch=bar.advance,
                    keep=keep,
                )
                results |= {KEPT: keep.images} if keep else {}
                write_atomically(done, save(results))
            bar.reach((number + 1) * len(split.labels), f"{figure.name} {results[figure.name].float().mean():.3f}")
    return {name: results[name] for name in (*(figure.name for figure in measured), KEPT)}  # in one order, wherever they come from
