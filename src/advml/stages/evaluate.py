"""`evaluate SCHEME REGIME`, or anyone's model: clean, robust and worst-case accuracy of one model on the test split."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from advml import tracking
from advml.data import adversarial
from advml.data.corruptions import published as corruptions
from advml.errors import UserError
from advml.evaluation import protocol, records, samples
from advml.networks import models
from advml.networks.given import Given
from advml.paths import Workspace, checked_name, model_name
from advml.progress import Bar
from advml.runtime.checkpoint import Checkpoint, discard, write_atomically
from advml.runtime.memo import Memo
from advml.stages.context import Context
from advml.training.regimes import REGIMES
from advml.training.schemes import SCHEMES

KEYS = ("scheme", "regime", "seed")
GRID = rf"({'|'.join(SCHEMES)})-({'|'.join((*REGIMES, 'st', 'at'))})-s\d+"  # names of the study's models and pretrainings
TAKEN = ("compare", "transfer", "tune")  # other folders of reports/
SECTIONS = ("data", "temperature", "threat_model", "evaluate", "worst_case", "diagnostics", "corruptions")


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, float]:
    """Write the model's record, metrics, samples and adversarial test images; returns the metrics."""
    name = model_name(scheme, regime, seed)
    workspace, folder = context.workspace, context.workspace.model(name)
    record, network = context.load_network(folder)
    discard(workspace.scratch(f"finetune-{name}"))  # its outputs are in use, so they are safe
    inputs = _inputs(context, record["digest"])
    stored = workspace.adversarial(name), workspace.samples(name)
    if reuse and all(path.exists() for path in stored) and records.reusable(workspace, "evaluate", name, inputs=inputs):
        return records.publish(workspace, name, digest=record["digest"])
    head = "from pretraining; the encoder has changed since" if REGIMES[regime].encoder_learns else "from pretraining"
    memo = Memo(Checkpoint(workspace.scratch(f"evaluate-{name}"), inputs).folder / inputs)
    subject = protocol.Subject(name, record["digest"], network, SCHEMES[scheme], note=f"projection head: {head}")
    found = evaluate(context, subject, memo)
    of = {"model": name, "digest": record["digest"]}
    adversarial.write(adversarial.AdversarialImages(found.images, of | found.kept), workspace.adversarial(name))
    samples.write(found.samples, workspace.samples(name))
    metrics = records.write(workspace, "evaluate", of | {"inputs": inputs, "metrics": found.metrics} | found.record)
    with tracking.attach_run(context.config, root=workspace.root, folder=folder) as run:
        run.log_params(context.parameters(*SECTIONS[2:]))
        run.log_metrics(found.metrics)
        run.set_tag("advml.flags", found.verdict)
        run.log_file(workspace.record("evaluate", name), "records/evaluate")
        run.log_file(workspace.samples(name), "samples")
    return metrics


def of_study(workspace: Workspace, target: str) -> dict[str, Any] | None:
    """Scheme, regime and seed of a model of this study, given by name or folder; None if it is none."""
    for folder in (Path(target), workspace.model(target)):
        if (folder / "model.json").is_file() and folder.resolve().parent == workspace.models.resolve():
            record = models.read_record(folder)
            return {key: record[key] for key in KEYS} if record.keys() >= set(KEYS) else None
    return None


def run_given(context: Context, given: Given) -> dict[str, float]:
    """Measure a model that is not of the grid: `metrics.json`, `evaluation.json` and `samples.parquet` in `reports/<name>/`."""
    workspace, config = context.workspace, context.config
    if checked_name(given.name) in TAKEN or re.fullmatch(GRID, given.name):
        raise UserError(f"{given.name} is a name of this study, whose results would be written over; choose another: --name")
    folder = workspace.report(given.name)
    inputs = _inputs(context, given.digest, given.origin)
    memo = Memo(Checkpoint(workspace.scratch(f"evaluate-{given.name}"), inputs).folder / inputs)
    network = given.network.to(context.machine.device)
    found = evaluate(context, protocol.Subject(given.name, given.digest, network, SCHEMES.get(given.scheme)), memo)
    samples.write(found.samples, workspace.samples(given.name))
    of = {"model": given.name, "digest": given.digest, "origin": given.origin, "data_digest": context.dataset.digest}
    record = of | {"trained_on": given.data, "metrics": found.metrics} | found.record
    write_atomically(folder / "evaluation.json", records.to_json(record))
    write_atomically(folder / "metrics.json", records.to_json(found.metrics))
    with tracking.open_run(
        config, root=workspace.root, name=given.name, kind="evaluation", tags={}, params=context.parameters(*SECTIONS)
    ) as run:
        run.log_metrics(found.metrics)
        run.set_tag("advml.flags", found.verdict)
        for file in ("evaluation.json", "samples.parquet"):
            run.log_file(folder / file)
    discard(workspace.scratch(f"evaluate-{given.name}"))
    return found.metrics


def _inputs(context: Context, *parts: object) -> str:
    """Everything that decides what is measured, files and libraries included that DVC does not watch."""
    config = context.config
    published = corruptions.find(config.data, config.corruptions) if config.corruptions.names else None
    read = [name for name in config.corruptions.names if published and name in published]
    versions = {name: version(name) for name in ("torch", "pyautoattack")}
    return context.fingerprint("evaluate", context.parameters(*SECTIONS), context.dataset.digest, read, versions, *parts)


def evaluate(context: Context, subject: protocol.Subject, memo: Memo) -> protocol.Evaluation:
    """Everything that params.yaml asks for, with a bar that shows the accuracy that stands so far."""
    with Bar(f"evaluate {subject.name}", total=protocol.work(context.config, subject, context.dataset)) as bar:
        return protocol.evaluate(
            subject, context.dataset, context.config, context.machine, memo=memo, tell=lambda done, note: bar.reach(done, note)
        )
