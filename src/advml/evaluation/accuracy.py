"""Accuracies with intervals from the outcomes of an evaluation, and a record of how each was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from advml import config
from advml.data.datasets import Split
from advml.evaluation.intervals import wilson
from advml.evaluation.measure import Effort, Outcome, measure
from advml.evaluation.passes import PASSES
from advml.evaluation.plan import Figure, figures
from advml.evaluation.samples import WORST
from advml.networks.models import Network
from advml.recipes import Scheme
from advml.runtime.machine import Machine


def effort(configuration: config.Config, machine: Machine) -> Effort:
    """As params.yaml says."""
    spec = configuration.evaluate
    return Effort(spec.batch_size, spec.seed, machine, keep=spec.adversarial_images)


def attacked(
    network: Network, split: Split, configuration: config.Config, scheme: Scheme, machine: Machine
) -> tuple[Tensor, dict[str, Any]]:
    """Adversarial images of the first test images as `evaluate` would store them, and the record of their attack."""
    count, size = configuration.evaluate.adversarial_images, configuration.evaluate.batch_size
    whole = None if count is None else size * math.ceil(count / size)  # whole batches: others would round differently
    some = Split(split.images[:whole], split.labels[:whole])
    clean, kept = (figure for figure in figures(configuration, scheme) if figure.craft is None or figure.kept)
    once = replace(kept, restarts=1)
    images = measure(network, some, [clean, once], effort(configuration, machine))[once.name].images
    return images, describe_kept(once, images, configuration)


def survivors(outcomes: Mapping[str, Outcome]) -> Tensor:
    """Which images no figure has broken: bool (N,)."""
    standing = next(iter(outcomes.values())).right.clone()  # of the clean images, which are all there
    for outcome in outcomes.values():
        standing[outcome.rows] &= outcome.right
    return standing


def metrics(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Flat metrics under the contract's names: share right, and the ends of its 95 % interval."""
    flat: dict[str, float] = {}
    right = {name: outcome.right for name, outcome in outcomes.items() if name.startswith("accuracy/")}
    for name, mask in (right | {WORST: survivors(outcomes)}).items():
        low, high = wilson(int(mask.sum()), len(mask))
        flat |= {name: float(mask.double().mean()), f"{name}/low": low, f"{name}/high": high}
    return flat


def describe(figure: Figure, outcome: Outcome, configuration: config.Config) -> dict[str, Any]:
    """The record of one figure: everything needed to measure it again, and what it took."""
    record = _counts(outcome.right)
    if figure.craft is None:
        return record
    return record | {**figure.settings, "restarts": figure.restarts, **_seed(configuration), **_passes(outcome)}


def describe_kept(figure: Figure, images: Tensor, configuration: config.Config) -> dict[str, Any]:
    """The record of stored adversarial images: those of the first restart."""
    return {"n": len(images), **figure.settings, "restarts": 1, **_seed(configuration)}


def describe_worst(plan: Sequence[Figure], outcomes: Mapping[str, Outcome], configuration: config.Config) -> dict[str, Any]:
    """The record of the worst case: the cascade, how many images each attack was aimed at, and how many it was the first to break."""
    standing = survivors({plan[0].name: outcomes[plan[0].name]})
    steps = []
    for figure in plan[1:]:
        outcome = outcomes[figure.name]
        broken = int((standing[outcome.rows] & ~outcome.right).sum())
        standing[outcome.rows] &= outcome.right
        attack = {**figure.settings, "restarts": figure.restarts}
        steps.append({"name": figure.name.split("/")[1], "aimed_at": len(outcome.rows), "broke": broken, **attack, **_passes(outcome)})
    threat = {name: plan[1].settings[name] for name in ("norm", "box")} | {"epsilon": configuration.attacked_epsilon}
    spent = {name: sum(step[name] for step in steps) for name in PASSES}
    return _counts(standing) | {"attack": "cascade", **threat, **_seed(configuration), **spent, "cascade": steps}


def _counts(right: Tensor) -> dict[str, Any]:
    return {"n": len(right), "correct": int(right.sum()), "interval": list(wilson(int(right.sum()), len(right)))}


def _seed(configuration: config.Config) -> dict[str, Any]:
    return {"seed": configuration.evaluate.seed, "batch_size": configuration.evaluate.batch_size}


def _passes(outcome: Outcome) -> dict[str, int]:
    """Passes of single images, over all of them."""
    return {name: round(float(getattr(outcome, name).double().sum())) for name in PASSES}
