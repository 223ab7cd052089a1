"""The whole evaluation of one model: threat models, worst case, diagnostics, corruptions; resumable in small parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from advml import config
from advml.data.corruptions import published as corruptions
from advml.data.datasets import Dataset
from advml.evaluation import accuracy, corruption, doubts, samples
from advml.evaluation.measure import Outcome, measure
from advml.evaluation.plan import Figure, plan
from advml.evaluation.verdict import verdict
from advml.runtime.machine import Machine
from advml.runtime.memo import Memo
from advml.training.schemes import Scheme


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate.

    Attributes:
        digest: sha256 of its weights.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        scheme: whose projection head it has; None: of nobody's.
        note: on that head, for the record.
    """

    name: str
    digest: str
    network: nn.Module
    scheme: Scheme | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` has measured.

    Attributes:
        metrics: flat, under the contract's names.
        record: `figures`, and whatever else explains the metrics.
        samples: a row per test image.
        images, kept: the adversarial images of threat model II, and the record of their attack.
    """

    metrics: dict[str, float]
    record: dict[str, Any]
    samples: pa.Table
    images: Tensor
    kept: dict[str, Any]

    @property
    def verdict(self) -> str:
        """Names of the flags that the diagnostics raised, or that there are none, or that nobody looked."""
        return verdict(self.record["diagnostics"])


def evaluate(
    subject: Subject,
    dataset: Dataset,
    configuration: config.Config,
    machine: Machine,
    *,
    memo: Memo,
    tell: Callable[[int, str], None] = lambda done, note: None,
) -> Evaluation:
    """Measure a model on the test split.

    Args:
        memo: remembers finished parts.
        tell: told how much of `work` is done, and what stands so far.
    """
    figures = _plan(configuration, subject, dataset)
    outcomes = measure(
        subject.network,
        dataset.test,
        figures,
        accuracy.effort(configuration, machine),
        memo=memo,
        on_batch=lambda done, standing: tell(done, f"worst case so far {100 * standing:.1f} %"),
    )
    metrics, described = accuracy.metrics(outcomes), _described(figures, outcomes, configuration)
    worst, done = f"worst case {100 * metrics[accuracy.WORST]:.1f} %", len(figures) * len(dataset.test)
    doubted = _doubts(subject, dataset, outcomes, configuration, machine, memo)
    tell(done + len(dataset.test), worst)
    done += len(dataset.test)
    rights = _corrupted(
        subject, dataset, configuration, machine, memo, tell=lambda share: tell(done + int(share * len(dataset.test)), worst)
    )
    (kept,) = (figure for figure in figures if figure.kept)
    about = _about(subject, dataset, configuration)
    published = corruptions.find(configuration.data, configuration.corruptions) if rights else None
    record = {"figures": described, "test_digest": about["test_digest"], "diagnostics": doubted}
    record |= {"corruptions": corruption.describe(rights, configuration.corruptions, published=published)}
    images = outcomes[kept.name].images
    return Evaluation(
        metrics | ({} if "skipped" in doubted else {"diagnostics/flags": len(doubted["flags"])}) | corruption.metrics(rights),
        record,
        samples.table(outcomes, dataset.test, about=about),
        images,
        accuracy.describe_kept(kept, images, configuration),
    )


def work(configuration: config.Config, subject: Subject, dataset: Dataset) -> int:
    """Units of work of `evaluate`, for a bar: the test images per figure, and as many for diagnostics and for all corruptions."""
    return (len(_plan(configuration, subject, dataset)) + 2) * len(dataset.test)


def _plan(configuration: config.Config, subject: Subject, dataset: Dataset) -> list[Figure]:
    return plan(configuration, subject.scheme, classes=len(dataset.classes), note=subject.note)


def _described(figures: list[Figure], outcomes: Mapping[str, Outcome], configuration: config.Config) -> dict[str, Any]:
    """Records of the figures that stand for themselves, and of the worst case, whose steps the others are."""
    alone = [figure for figure in figures if not figure.left_only]
    described = {figure.name: accuracy.describe(figure, outcomes[figure.name], configuration) for figure in alone}
    return described | {accuracy.WORST: accuracy.describe_worst(figures, outcomes, configuration)}


def _about(subject: Subject, dataset: Dataset, configuration: config.Config) -> dict[str, Any]:
    threat = {"norm": configuration.threat_model.norm, "epsilon": configuration.attacked_epsilon}
    return {"model": subject.name, "digest": subject.digest, "test_digest": samples.digest_of(dataset.test), **threat}


def _doubts(
    subject: Subject, dataset: Dataset, outcomes: Mapping[str, Outcome], configuration: config.Config, machine: Machine, memo: Memo
) -> dict[str, Any]:
    if not configuration.diagnostics.images:
        return {"flags": [], "skipped": "diagnostics.images = 0"}
    classes = len(dataset.classes)
    return memo.json("diagnostics", lambda: doubts.look(subject.network, dataset.test, outcomes, configuration, machine, classes=classes))


def _corrupted(
    subject: Subject, dataset: Dataset, configuration: config.Config, machine: Machine, memo: Memo, *, tell: Callable[[float], None]
) -> dict[str, Tensor]:
    """Which images are right under each corruption, (severities, images) by name."""
    spec, rights = configuration.corruptions, {}
    how = {"machine": machine, "batch_size": configuration.evaluate.batch_size}
    how |= {"published": corruptions.find(configuration.data, spec) if spec.names else None}
    for name in spec.names:

        def one(name: str = name) -> dict[str, Tensor]:
            return {"right": corruption.one(subject.network, dataset.test, spec, name, **how)}

        rights[name] = memo(f"corruption {name}", one)["right"]
        tell(len(rights) / len(spec.names))
    return rights
