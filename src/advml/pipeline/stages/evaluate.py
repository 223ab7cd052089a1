"""Stage `evaluate SCHEME REGIME`, also for external models: clean, robust and worst-case accuracy of one model on the test split."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from advml import config, tracking
from advml.attacks.autoattack import not_run
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.core.io import discard
from advml.core.messages import tell
from advml.core.paths import Workspace, checked_name, home_of, is_reserved, model_name
from advml.core.progress import Bar
from advml.core.result_cache import Memo, forget
from advml.data import adversarial
from advml.data.corruptions import cifar_c
from advml.data.datasets import Dataset
from advml.data.prepared import require_labels
from advml.evaluation import evaluate as evaluation
from advml.evaluation import expectations, records, samples
from advml.evaluation.attack_suite import attack_suite
from advml.models.external import Given
from advml.models.network import read_record
from advml.pipeline.context import Context
from advml.recipes import REGIMES, SCHEMES, Scheme
from advml.training.checkpoint import Checkpoint, discard_finished

KEYS = ("scheme", "regime", "seed")
ATTACKS = ("temperature", "threat_model", "evaluate", "worst_case")
# Part of an evaluation -> parameters and libraries on which its metrics depend, besides model and test images. Parts are cached
# separately: a change in `diagnostics` keeps the results of attacks. `corruption` and `diagnostics` are names of parts in `evaluate`.
PARTS = {
    "attacks": (ATTACKS, ("torch", "numpy", "timm", "pyautoattack")),
    "diagnostics": ((*ATTACKS, "diagnostics"), ("torch", "numpy", "timm", "pyautoattack")),
    "corruption": (("data", "evaluate.batch_size", "corruptions"), ("torch", "numpy", "timm", "scipy", "pillow")),
}
OF_THE_STUDY = ("threat_model", "evaluate", "worst_case", "diagnostics", "corruptions")  # parameters in the record
OF_GIVEN = ("data", "temperature", *OF_THE_STUDY)  # parameters in the record of an external model, which has no model.json


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, float]:
    """Write the model's record, metrics, samples and adversarial test images; returns the metrics."""
    name = model_name(scheme, regime, seed)
    workspace, folder = context.workspace, context.workspace.model(name)
    model, network = context.load_network(folder)
    discard_finished(workspace.scratch(f"finetune-{name}"), model.get("inputs"))
    parts, scratch = _parts(context, model["digest"]), workspace.scratch(f"evaluate-{name}")
    stored = workspace.adversarial(name), workspace.samples(name)
    if reuse and all(path.exists() for path in stored) and records.reusable(workspace, "evaluate", name, inputs=config.digest(parts)):
        forget(scratch, "images")
        return records.publish(workspace, name, digest=model["digest"])
    head = "from pretraining; the encoder has changed since" if REGIMES[regime].encoder_learns else "from pretraining"
    subject = evaluation.Subject(name, model["digest"], network)
    attacked = _threatened(network, scheme)
    found = evaluate(context, subject, settings(context.config, context.dataset, attacked, note=f"projection head: {head}"), parts)
    about = {"model": name, "digest": model["digest"]}
    adversarial.write(adversarial.AdversarialImages(found.images, about | found.kept), workspace.adversarial(name))
    metrics = _write(context, found, about, parts, parameters=OF_THE_STUDY)
    tracking.log_folder(context.tracking, folder)
    # Outcomes stay in the cache, a few bytes per image and attack, so that a change of `diagnostics` or `corruptions`, or a kill before DVC
    # has taken the outputs, needs no new attacks. Images are removed; they are stored now, and threat model II can make them again.
    forget(scratch, "images")
    return metrics


def of_study(workspace: Workspace, target: str) -> dict[str, Any] | None:
    """Scheme, regime and seed of a model of this study, given by name or folder; None for other models."""
    for folder in (Path(target), workspace.model(target)):
        home = home_of(folder)
        if (folder / "model.json").is_file() and home and home[0].root.resolve() == workspace.root.resolve():
            record = read_record(folder)
            return {key: record[key] for key in KEYS} if record.keys() >= set(KEYS) else None
    return None


def trained(workspace: Workspace, model: str) -> Path:
    """Folder of a model of this study; raises UserError if it is not trained."""
    read_record(workspace.model(model))
    return workspace.model(model)


def run_given(context: Context, given: Given) -> dict[str, float]:
    """Evaluate a model outside of the grid; writes its record, metrics and samples, and returns the metrics."""
    workspace, name = context.workspace, given.name
    if is_reserved(checked_name(name)):
        raise UserError(f"{name} is a name of this study, whose results would be overwritten; choose another with --name")
    parts, network = _parts(context, given.digest, given.origin), given.network.to(context.machine.device)
    expected = expected_of(given, network, context.dataset, context.machine, batch_size=context.config.evaluate.batch_size)
    for flag in expected.flags:  # warn before hours of attacks on a model with wrong settings
        tell(f"warning: {name}: {flag.saw}; to try: {flag.try_}")
    subject = evaluation.Subject(name, given.digest, network, flags=expected.flags)
    found = evaluate(context, subject, settings(context.config, context.dataset, _threatened(network, given.scheme)), parts)
    about = {"model": name, "digest": given.digest, "origin": given.origin}
    about |= {"trained_on": given.data, "classes": given.classes, "expected": expected.record}
    metrics = _write(context, found, about, parts, parameters=OF_GIVEN)
    for older in workspace.older_evaluations(name):
        older.unlink(missing_ok=True)
    tracking.log_result(context.tracking, name)
    discard(workspace.scratch(f"evaluate-{name}"))
    return metrics


def _threatened(network: nn.Module, scheme: str | None) -> Scheme | None:
    """Scheme whose contrastive objective is attacked; None if the network has no projection head."""
    return SCHEMES.get(scheme or "") if getattr(network, "projection_head", network) is not None else None


def settings(whole: config.Config, dataset: Dataset, scheme: Scheme | None, *, note: str = "") -> evaluation.EvaluationSettings:
    """Settings of the evaluation of one model, from params.yaml; `scheme`: that of its projection head, `note`: remark on it."""
    require_labels(dataset, "evaluate")
    spec, classes = whole.evaluate, len(dataset.classes)
    attacks = attack_suite(spec, whole.threat_model, whole.worst_case, scheme, temperature=whole.temperature, classes=classes, note=note)
    return evaluation.EvaluationSettings(
        attacks=tuple(attacks),
        batch_size=spec.batch_size,
        seed=spec.seed,
        diagnostics=whole.diagnostics,
        corruptions=whole.corruptions,
        keep=spec.adversarial_images,
        published=_published(whole),
        not_run=not_run(whole.worst_case.attacks, classes),
    )


def evaluate(
    context: Context, subject: evaluation.Subject, settings: evaluation.EvaluationSettings, parts: dict[str, str]
) -> evaluation.Evaluation:
    """Evaluate a model with a progress bar that shows the worst-case accuracy so far."""
    for attack, reason in settings.not_run.items():
        tell(f"warning: {subject.name}: worst_case.attacks: {attack} is not run: it {reason}")
    scratch = context.workspace.scratch(f"evaluate-{subject.name}")
    attacks, *others = (Checkpoint(scratch / part, fingerprint).folder / fingerprint for part, fingerprint in parts.items())
    memo = Memo(attacks, apart=dict(zip(list(parts)[1:], others, strict=True)))
    with Bar(f"evaluate {subject.name}", total=settings.parts * len(context.dataset.test)) as bar:
        return evaluation.evaluate(subject, context.dataset, settings, context.machine, memo=memo, on_progress=bar.reach)


def _write(
    context: Context, found: evaluation.Evaluation, about: dict[str, Any], parts: dict[str, str], *, parameters: tuple[str, ...]
) -> dict[str, float]:
    """Write samples and record, where `about` describes the model; returns the metrics."""
    samples.write(found.samples, context.workspace.samples(about["model"]))
    record = about | {"data_digest": context.dataset.digest, "inputs": config.digest(parts), "metrics": found.metrics} | found.record
    return records.write(context.workspace, "evaluate", record | context.made_by(context.parameters(*parameters)))


def expected_of(given: Given, network: nn.Module, dataset: Dataset, machine: Machine, *, batch_size: int) -> expectations.Expectations:
    """Check an external model's normalisation and class order; not needed for networks of advml, which record both."""
    if given.constants is None:
        return expectations.Expectations((), {})
    return expectations.check_expectations(
        network, dataset, machine, constants=given.constants, classes=given.classes, batch_size=batch_size
    )


def _parts(context: Context, *model: object) -> dict[str, str]:
    """Fingerprint of each of PARTS, from everything that determines its result, including files and libraries that DVC does not track.

    Raises:
        UserError: a required library is not installed.
    """
    spec = context.config.diagnostics
    more = {"diagnostics": _foolbox(spec.minimal) if spec.images and spec.minimal else None, "corruption": _files(context.config)}
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
        remedy = 'install it with: pip install "advml[distances]", or set diagnostics.minimal: null'
        raise UserError(f"diagnostics.minimal = {minimal} needs foolbox; {remedy}") from None


def _published(configuration: config.Config) -> cifar_c.Published | None:
    """Published files of corruptions; None: corruptions are computed, or not measured."""
    return cifar_c.find(configuration.data, configuration.corruptions) if configuration.corruptions.names else None


def _files(configuration: config.Config) -> list[list[Any]]:
    """Sizes and times of published corruption files, because digests would take as long as an evaluation."""
    found = _published(configuration)
    files = [found.folder / f"{name}.npy" for name in (*configuration.corruptions.names, "labels") if name in found] if found else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
