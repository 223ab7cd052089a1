"""`evaluate SCHEME REGIME`, or anyone's model: clean, robust and worst-case accuracy of one model on the test split."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from advml import config, tracking
from advml.data import adversarial
from advml.data.corruptions import published as corruptions
from advml.errors import UserError
from advml.evaluation import expectations, protocol, records, samples
from advml.lines import tell
from advml.networks import models
from advml.networks.given import Given
from advml.paths import Workspace, checked_name, home_of, is_reserved, model_name
from advml.progress import Bar
from advml.recipes import REGIMES, SCHEMES
from advml.runtime.checkpoint import Checkpoint, discard, discard_finished, write_atomically
from advml.runtime.memo import Memo, forget
from advml.stages.context import Context

KEYS = ("scheme", "regime", "seed")
GRID = rf"({'|'.join(SCHEMES)})-({'|'.join((*REGIMES, 'st', 'at'))})-s\d+"  # names of the study's models and pretrainings
ATTACKS = ("temperature", "threat_model", "evaluate", "worst_case")
# Part of an evaluation -> what its figures depend on beside model and test images: parameters, and libraries. Each part is remembered
# by itself: who corrects a mistake in `diagnostics` keeps the attacks. `corruption` and `diagnostics` are what `protocol` calls its parts.
PARTS = {
    "attacks": (ATTACKS, ("torch", "numpy", "timm", "pyautoattack")),
    "diagnostics": ((*ATTACKS, "diagnostics"), ("torch", "numpy", "timm", "pyautoattack")),
    "corruption": (("data", "evaluate.batch_size", "corruptions"), ("torch", "numpy", "timm", "scipy", "pillow")),
}
SECTIONS = ("data", *ATTACKS, "diagnostics", "corruptions")


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, float]:
    """Write the model's record, metrics, samples and adversarial test images; returns the metrics."""
    name = model_name(scheme, regime, seed)
    workspace, folder = context.workspace, context.workspace.model(name)
    record, network = context.load_network(folder)
    discard_finished(workspace.scratch(f"finetune-{name}"), record.get("inputs"))
    parts = _parts(context, record["digest"])
    inputs = config.digest(parts)
    stored = workspace.adversarial(name), workspace.samples(name)
    scratch = workspace.scratch(f"evaluate-{name}")
    if reuse and all(path.exists() for path in stored) and records.reusable(workspace, "evaluate", name, inputs=inputs):
        forget(scratch, "images")
        return records.publish(workspace, name, digest=record["digest"])
    head = "from pretraining; the encoder has changed since" if REGIMES[regime].encoder_learns else "from pretraining"
    memo = _memo(scratch, parts)
    subject = protocol.Subject(name, record["digest"], network, SCHEMES[scheme], note=f"projection head: {head}")
    found = evaluate(context, subject, memo)
    of = {"model": name, "digest": record["digest"]}
    adversarial.write(adversarial.AdversarialImages(found.images, of | found.kept), workspace.adversarial(name))
    samples.write(found.samples, workspace.samples(name))
    parameters = context.parameters(*SECTIONS[2:])
    metrics = records.write(
        workspace, "evaluate", of | {"inputs": inputs, "parameters": parameters, "metrics": found.metrics} | found.record
    )
    with tracking.attach_run(context.config, root=workspace.root, folder=folder) as run:
        tracking.log_evaluation(run, workspace, name)
    # The outcomes stay, a few bytes per image and attack: a correction of `diagnostics` or `corruptions` needs no new attack, and a stage
    # that is killed before DVC has taken its outputs no second cascade. The images are stored now; threat model II makes them again.
    forget(scratch, "images")
    return metrics


def of_study(workspace: Workspace, target: str) -> dict[str, Any] | None:
    """Scheme, regime and seed of a model of this study, given by name or folder; None if it is none."""
    for folder in (Path(target), workspace.model(target)):
        home = home_of(folder)
        if (folder / "model.json").is_file() and home and home[0].root.resolve() == workspace.root.resolve():
            record = models.read_record(folder)
            return {key: record[key] for key in KEYS} if record.keys() >= set(KEYS) else None
    return None


def trained(workspace: Workspace, model: str) -> Path:
    """The folder of a model of this study; UserError if it is not trained."""
    models.read_record(workspace.model(model))
    return workspace.model(model)


def run_given(context: Context, given: Given) -> dict[str, float]:
    """Measure a model that is not of the grid: `metrics.json` and `samples.parquet` in `reports/<name>/`, and its record."""
    workspace = context.workspace
    if is_reserved(checked_name(given.name)) or re.fullmatch(GRID, given.name):
        raise UserError(f"{given.name} is a name of this study, whose results would be written over; choose another: --name")
    folder = workspace.report(given.name)
    memo = _memo(workspace.scratch(f"evaluate-{given.name}"), _parts(context, given.digest, given.origin))
    network = given.network.to(context.machine.device)
    expected = _expected(context, given, network)
    for flag in expected.flags:  # before the hours that it takes to attack the wrong model
        tell(f"warning: {given.name}: {flag.saw}; to try: {flag.try_}")
    found = evaluate(context, protocol.Subject(given.name, given.digest, network, SCHEMES.get(given.scheme), flags=expected.flags), memo)
    samples.write(found.samples, workspace.samples(given.name))
    of = {"model": given.name, "digest": given.digest, "origin": given.origin, "data_digest": context.dataset.digest}
    of |= {"trained_on": given.data, "classes": given.classes, "expected": expected.record}
    record = of | {"metrics": found.metrics} | found.record | context.made_by(context.parameters(*SECTIONS))
    write_atomically(workspace.given(given.name), records.to_json(record))
    write_atomically(folder / "metrics.json", records.to_json(found.metrics))
    (folder / "evaluation.json").unlink(missing_ok=True)  # of an older version, which wrote the record there
    tracking.log_result(context.config, tracking.results.evaluation(workspace, given.name), root=workspace.root)
    discard(workspace.scratch(f"evaluate-{given.name}"))
    return found.metrics


def _expected(context: Context, given: Given, network: nn.Module) -> expectations.Expectations:
    """Whether it seems to be measured on the images and labels that it expects; a network of ours says so itself."""
    if given.constants is None:
        return expectations.Expectations((), {})
    size = context.config.evaluate.batch_size
    about = {"constants": given.constants, "classes": given.classes}
    return expectations.look(network, context.dataset, context.machine, **about, batch_size=size)


def _parts(context: Context, *model: object) -> dict[str, str]:
    """For each of PARTS a fingerprint of everything that decides what is measured, files and libraries included that DVC does not watch.

    Raises:
        UserError: a library that is asked for is not installed.
    """
    spec = context.config.diagnostics
    more = {"diagnostics": _foolbox(spec.minimal) if spec.images and spec.minimal else None, "corruption": _published(context.config)}
    versions = {part: {name: version(name) for name in libraries} for part, (_, libraries) in PARTS.items()}
    return {
        part: context.fingerprint(
            "evaluate", part, context.parameters(*keys), context.dataset.digest, versions[part], more.get(part), *model
        )
        for part, (keys, _) in PARTS.items()
    }


def _foolbox(minimal: str) -> str:
    try:
        return version("foolbox")
    except PackageNotFoundError:
        remedy = 'install it with: pip install "advml[foolbox]", or set diagnostics.minimal: null'
        raise UserError(f"diagnostics.minimal = {minimal} needs foolbox; {remedy}") from None


def _published(configuration: config.Config) -> list[list[Any]]:
    """The published files that are read, by size and date: a digest of theirs would take as long as an evaluation."""
    spec = configuration.corruptions
    found = corruptions.find(configuration.data, spec) if spec.names else None
    files = [found.folder / f"{name}.npy" for name in (*spec.names, "labels") if name in found] if found else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _memo(scratch: Path, parts: dict[str, str]) -> Memo:
    """Remembers the parts of an evaluation, each as long as what it depends on stays the same."""
    attacks, *others = (Checkpoint(scratch / part, fingerprint).folder / fingerprint for part, fingerprint in parts.items())
    return Memo(attacks, apart=dict(zip(list(parts)[1:], others, strict=True)))


def evaluate(context: Context, subject: protocol.Subject, memo: Memo) -> protocol.Evaluation:
    """Everything that params.yaml asks for, with a bar that shows the accuracy that stands so far."""
    with Bar(f"evaluate {subject.name}", total=protocol.work(context.config, subject, context.dataset)) as bar:
        return protocol.evaluate(
            subject, context.dataset, context.config, context.machine, memo=memo, tell=lambda done, note: bar.reach(done, note)
        )
