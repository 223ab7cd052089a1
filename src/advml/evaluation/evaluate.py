"""Evaluate one model: threat models, worst case, diagnostics and corruptions, resumable in small parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.isolation import copied, frozen_copy
from advml.attacks.threat_model import ThreatModel
from advml.core.device import Machine, out_of_memory, own_randomness
from advml.core.errors import Failure, UserError
from advml.core.messages import tell
from advml.core.result_cache import Memo
from advml.data.corruptions.cifar_c import Published
from advml.data.datasets import Dataset, Split
from advml.evaluation import corruption, metrics, samples
from advml.evaluation.attack_suite import AttackSpec
from advml.evaluation.masking import diagnose
from advml.evaluation.masking.rules import Flag, at_chance
from advml.evaluation.run_attacks import Scorer, run_attacks
from advml.models.micro_batches import InParts
from advml.models.network import Network


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation, resolved from params.yaml for one model and dataset.

    Attributes:
        attacks: the list of `attack_suite`; exactly one is `kept`.
        batch_size, seed: of attacks, diagnostics and corruptions.
        keep: number of adversarial images to store of the `kept` attack; None: all.
        published: published files of corrupted images; None: corruptions are computed.
        not_run: attacks that were asked for and are not in `attacks` -> reason, for the record of the worst case.
    """

    attacks: tuple[AttackSpec, ...]
    batch_size: int
    seed: int
    diagnostics: config.Diagnostics
    corruptions: config.Corruptions
    keep: int | None = None
    published: Published | None = None
    not_run: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> AttackSpec:
        """Attack whose images are stored: threat model II at full epsilon."""
        (found,) = (attack for attack in self.attacks if attack.kept)
        return found

    @property
    def threat_model(self) -> ThreatModel:
        """Threat model of the evaluation."""
        return self.kept.threat_model

    @property
    def parts(self) -> int:
        """Number of parts for a progress bar: one per attack, one for diagnostics and one for all corruptions, if any."""
        return len(self.attacks) + bool(self.diagnostics.images) + bool(self.corruptions.names)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate.

    Attributes:
        digest: sha256 of its weights.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        flags: flags raised before the evaluation.
    """

    name: str
    digest: str
    network: nn.Module
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        metrics: flat, with the names used in metrics.json.
        record: `figures` (how each accuracy was measured), and everything else that explains the metrics.
        samples: one row per test image.
        images, kept: the adversarial images of threat model II, and the record of their attack.
    """

    metrics: dict[str, float]
    record: dict[str, Any]
    samples: pa.Table
    images: Tensor
    kept: dict[str, Any]


def evaluate(
    subject: Subject,
    dataset: Dataset,
    settings: EvaluationSettings,
    machine: Machine,
    *,
    memo: Memo,
    on_progress: Callable[[int, str], None] = lambda done, note: None,
) -> Evaluation:
    """Evaluate a model on the test split; when memory is exhausted, repeat the current part with half as many images per pass.

    Batches stay the same, and pass the network in smaller parts, so that figures do not depend on it, up to rounding.

    Args:
        memo: stores finished parts.
        on_progress: called with the number of images done, out of `settings.parts` * N, and a note on the worst case so far.
    Raises:
        Failure: the memory does not suffice for one image.
    """
    network, images = subject.network, settings.batch_size
    while True:
        try:
            return _evaluate(subject, dataset, settings, machine, memo=memo, on_progress=on_progress)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if images == 1:
            raise Failure(f"the memory of {machine.device} does not suffice to attack one image of {subject.name}; free some memory")
        images //= 2
        tell(f"note: {subject.name} needs more memory than {machine.device} has; going on with {images} images at a time")
        if isinstance(network, Network):
            network.micro_batch = images
        else:
            subject = replace(subject, network=InParts(network, images))


def _evaluate(
    subject: Subject,
    dataset: Dataset,
    settings: EvaluationSettings,
    machine: Machine,
    *,
    memo: Memo,
    on_progress: Callable[[int, str], None],
) -> Evaluation:
    test, classes, network = dataset.test, len(dataset.classes), subject.network.eval()
    run = {"seed": settings.seed, "batch_size": settings.batch_size}
    check_model(network, machine.images(test.images[: settings.batch_size]), machine, classes=classes)
    scorer, untouched = Scorer.of(network, machine), copied(network)  # made before any attack

    def on_batch(done: int, standing: float) -> None:
        on_progress(done, f"worst case so far {100 * standing:.1f} %")

    attacks, spec = list(settings.attacks), settings.diagnostics
    outcomes = run_attacks(network, scorer, test, attacks, **run, keep=settings.keep, memo=memo, on_batch=on_batch)
    images = outcomes[settings.kept.name].images
    if spec.images:

        def diagnosed() -> dict[str, Any]:
            return diagnose.diagnose(network, scorer, test, outcomes, spec, settings.threat_model, classes=classes, **run)

        diagnosis = memo.json("diagnostics", diagnosed)
    else:
        diagnosis = diagnose.unprobed(network, scorer, outcomes, reason="diagnostics.images = 0")
    before = (*subject.flags, *at_chance(int(outcomes[samples.CLEAN].right.sum()), test.labels.bincount().tolist()))
    diagnosis = diagnosis | {"flags": [*(flag.as_record() for flag in before), *diagnosis["flags"]]}
    more, steps = diagnose.as_attacks(diagnosis, outcomes, spec, settings.threat_model)
    attacks, outcomes = attacks + more, outcomes | steps
    found = metrics.metrics(outcomes)
    worst, done = f"worst case {100 * found[samples.WORST]:.1f} %", (len(settings.attacks) + bool(spec.images)) * len(test)
    on_progress(done, worst)
    rights = _corrupted(untouched, test, settings, machine, memo, lambda share: on_progress(done + int(share * len(test)), worst))
    about = {"model": subject.name, "digest": subject.digest, "test_digest": samples.digest_of(test), **asdict(settings.threat_model)}
    # Left out if probes were not run and there are no flags, because 0 would mean that there are none.
    flags = {"diagnostics/flags": len(diagnosis["flags"])} if diagnosis["flags"] or "skipped" not in diagnosis else {}
    figures = metrics.describe(attacks, outcomes, **run)
    figures[samples.WORST] |= {"not_run": dict(settings.not_run)} if settings.not_run else {}
    return Evaluation(
        found | flags | corruption.metrics(rights),
        {
            "figures": figures,
            "test_digest": about["test_digest"],
            "diagnostics": diagnosis,
            "corruptions": corruption.describe(rights, settings.corruptions, published=settings.published),
        },
        samples.table(outcomes, test, about=about),
        images,
        metrics.describe_kept(settings.kept, len(images), **run),
    )


def check_model(network: nn.Module, images: Tensor, machine: Machine, *, classes: int) -> None:
    """Check output shape and gradients of a copy of the network, on all images (N, C, H, W) and on the first alone.

    Raises:
        UserError: the network does not return one logit per class and image for batches of any size.
    """
    for batch in (images, images[:1]):
        with own_randomness(0, images.device), frozen_copy(network) as own, torch.enable_grad():
            asked = batch.detach().clone().requires_grad_()
            with machine.autocast():
                logits = own(asked)
            found = tuple(logits.shape)
            if found != (len(batch), classes):
                raise UserError(
                    f"the model gives {found} for {len(batch)} images; attacks need ({len(batch)}, {classes}): a logit per class"
                )
            if logits.requires_grad:
                torch.autograd.grad(logits.float().sum(), asked, allow_unused=True)


def _corrupted(
    untouched: nn.Module, test: Split, settings: EvaluationSettings, machine: Machine, memo: Memo, on_share: Callable[[float], None]
) -> dict[str, Tensor]:
    """Correct images under each corruption: name -> bool (severities, images).

    Each corruption uses a fresh copy of the model as it was before all attacks, so that state changed by an attack or another corruption
    has no effect.
    """
    spec, rights = settings.corruptions, {}
    about = {"machine": machine, "batch_size": settings.batch_size, "published": settings.published}
    for name in spec.names:
        rights[name] = memo(
            f"corruption {name}", lambda name=name: {"right": corruption.one(copied(untouched), test, spec, name, **about)}
        )["right"]
        on_share(len(rights) / len(spec.names))
    return rights
