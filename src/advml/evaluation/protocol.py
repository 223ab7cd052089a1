"""The whole evaluation of one model: threat models, worst case, diagnostics, corruptions; resumable in small parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from advml import config
from advml.data.datasets import Dataset
from advml.evaluation import accuracy, samples
from advml.evaluation.measure import measure
from advml.evaluation.plan import plan
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
    figures = plan(configuration, subject.scheme, classes=len(dataset.classes), note=subject.note)
    outcomes = measure(
        subject.network,
        dataset.test,
        figures,
        accuracy.effort(configuration, machine),
        memo=memo,
        on_batch=lambda done, standing: tell(done, f"worst case so far {100 * standing:.1f} %"),
    )
    described = {figure.name: accuracy.describe(figure, outcomes[figure.name], configuration) for figure in figures[: _published(figures)]}
    described[accuracy.WORST] = accuracy.describe_worst(figures, outcomes, configuration)
    (kept,) = (figure for figure in figures if figure.kept)
    about = {
        "model": subject.name,
        "digest": subject.digest,
        "test_digest": samples.digest_of(dataset.test),
        "norm": configuration.threat_model.norm,
        "epsilon": configuration.attacked_epsilon,
    }
    return Evaluation(
        accuracy.metrics(outcomes),
        {"figures": described, "test_digest": about["test_digest"]},
        samples.table(outcomes, dataset.test, about=about),
        outcomes[kept.name].images,
        accuracy.describe_kept(kept, outcomes[kept.name].images, configuration),
    )


def _published(figures: list[Any]) -> int:
    """How many figures stand for themselves; the rest are the cascade."""
    return sum(not figure.left_only for figure in figures)


def work(configuration: config.Config, subject: Subject, dataset: Dataset) -> int:
    """Units of work of `evaluate`, for a bar."""
    return len(dataset.test) * len(plan(configuration, subject.scheme, classes=len(dataset.classes)))
