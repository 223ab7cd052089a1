"""The whole evaluation of one model: threat models, worst case, diagnostics, corruptions; resumable in small parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from advml import config
from advml.attacks.guard import copied
from advml.data.corruptions import published as corruptions
from advml.data.datasets import Dataset
from advml.evaluation import accuracy, corruption, doubts, samples
from advml.evaluation.diagnostics.flags import Flag
from advml.evaluation.measure import Outcome, measure
from advml.evaluation.plan import Figure, plan
from advml.evaluation.rehearsal import rehearse
from advml.evaluation.scoring import Scorer
from advml.evaluation.verdict import verdict
from advml.recipes import Scheme
from advml.runtime.machine import Machine
from advml.runtime.memo import Memo


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to evaluate.

    Attributes:
        digest: sha256 of its weights.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        scheme: whose projection head it has; None: of nobody's.
        note: on that head, for the record.
        flags: raised before it is measured.
    """

    name: str
    digest: str
    network: nn.Module
    scheme: Scheme | None = None
    note: str = ""
    flags: tuple[Flag, ...] = ()


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
    figures, test = _plan(configuration, subject, dataset), dataset.test
    rehearse(
        subject.network.eval(), machine.images(test.images[: configuration.evaluate.batch_size]), machine, classes=len(dataset.classes)
    )
    scorer, untouched = Scorer(copied(subject.network), machine), copied(subject.network)  # made before any attack
    outcomes = measure(
        subject.network,
        dataset.test,
        figures,
        accuracy.effort(configuration, machine),
        memo=memo,
        scorer=scorer,
        on_batch=lambda done, standing: tell(done, f"worst case so far {100 * standing:.1f} %"),
    )
    done = (len(figures) + _looks(configuration)) * len(test)
    doubted = _doubts(subject, scorer, dataset, outcomes, configuration, memo)
    doubted = doubted | {"flags": [*(flag.as_record() for flag in subject.flags), *doubted["flags"]]}
    (kept,) = (figure for figure in figures if figure.kept)
    more, steps = doubts.counted(doubted, outcomes, configuration)
    figures, outcomes = figures + more, outcomes | steps
    metrics, described = accuracy.metrics(outcomes), _described(figures, outcomes, configuration)
    worst = f"worst case {100 * metrics[samples.WORST]:.1f} %"
    tell(done, worst)
    rights = _corrupted(untouched, dataset, configuration, machine, memo, tell=lambda share: tell(done + int(share * len(test)), worst))
    about = _about(subject, dataset, configuration)
    published = corruptions.find(configuration.data, configuration.corruptions) if rights else None
    record = {"figures": described, "test_digest": about["test_digest"], "diagnostics": doubted}
    record |= {"corruptions": corruption.describe(rights, configuration.corruptions, published=published)}
    images = outcomes[kept.name].images
    return Evaluation(
        metrics | _counted(doubted) | corruption.metrics(rights),
        record,
        samples.table(outcomes, dataset.test, about=about),
        images,
        accuracy.describe_kept(kept, images, configuration),
    )


def work(configuration: config.Config, subject: Subject, dataset: Dataset) -> int:
    """Units of work of `evaluate`, for a bar: the test images per figure, and as many for diagnostics and for all corruptions, if any."""
    parts = len(_plan(configuration, subject, dataset)) + _looks(configuration) + bool(configuration.corruptions.names)
    return parts * len(dataset.test)


def _looks(configuration: config.Config) -> bool:
    """Whether there are diagnostics."""
    return configuration.diagnostics.images > 0


def _plan(configuration: config.Config, subject: Subject, dataset: Dataset) -> list[Figure]:
    return plan(configuration, subject.scheme, classes=len(dataset.classes), note=subject.note)


def _described(figures: list[Figure], outcomes: Mapping[str, Outcome], configuration: config.Config) -> dict[str, Any]:
    """Records of the figures that stand for themselves, and of the worst case, whose steps the others are."""
    alone = [figure for figure in figures if not figure.left_only]
    described = {figure.name: accuracy.describe(figure, outcomes[figure.name], configuration) for figure in alone}
    return described | {samples.WORST: accuracy.describe_worst(figures, outcomes, configuration)}


def _about(subject: Subject, dataset: Dataset, configuration: config.Config) -> dict[str, Any]:
    threat = {"norm": configuration.threat_model.norm, "epsilon": configuration.attacked_epsilon}
    return {"model": subject.name, "digest": subject.digest, "test_digest": samples.digest_of(dataset.test), **threat}


def _doubts(
    subject: Subject, scorer: Scorer, dataset: Dataset, outcomes: Mapping[str, Outcome], configuration: config.Config, memo: Memo
) -> dict[str, Any]:
    if not configuration.diagnostics.images:
        return doubts.unprobed(subject.network, scorer, outcomes, reason="diagnostics.images = 0")
    given = (subject.network, scorer, dataset.test, outcomes, configuration, scorer.machine)
    return memo.json("diagnostics", lambda: doubts.look(*given, classes=len(dataset.classes)))


def _counted(doubted: Mapping[str, Any]) -> dict[str, int]:
    """The number of flags; of a model that was not judged, only where there are some: no number is no clean bill."""
    return {"diagnostics/flags": len(doubted["flags"])} if doubted["flags"] or "skipped" not in doubted else {}


def _corrupted(
    untouched: nn.Module, dataset: Dataset, configuration: config.Config, machine: Machine, memo: Memo, *, tell: Callable[[float], None]
) -> dict[str, Tensor]:
    """Which images are right under each corruption, (severities, images) by name.

    Each is scored by a copy of its own of the model that no attack has touched: nothing that the model remembers of an attack, or of
    another corruption, changes it.
    """
    spec, rights = configuration.corruptions, {}
    how = {"machine": machine, "batch_size": configuration.evaluate.batch_size}
    how |= {"published": corruptions.find(configuration.data, spec) if spec.names else None}
    for name in spec.names:

        def one(name: str = name) -> dict[str, Tensor]:
            return {"right": corruption.one(copied(untouched), dataset.test, spec, name, **how)}

        rights[name] = memo(f"corruption {name}", one)["right"]
        tell(len(rights) / len(spec.names))
    return rights
