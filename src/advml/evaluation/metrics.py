"""Accuracies with intervals from the outcomes of an evaluation, and a record of each measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from advml.attacks.threat_model import ThreatModel
from advml.evaluation.attack_suite import AttackSpec, ball
from advml.evaluation.intervals import wilson
from advml.evaluation.samples import PASSES, WORST, Outcome


def survivors(outcomes: Mapping[str, Outcome]) -> Tensor:
    """Mask (N,) of the images that no attack has broken."""
    standing = next(iter(outcomes.values())).right.clone()  # the first outcome is that of all clean images
    for outcome in outcomes.values():
        standing[outcome.rows] &= outcome.right
    return standing


def metrics(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Flat metrics with the names of metrics.json: each accuracy and the ends of its 95 % interval."""
    flat: dict[str, float] = {}
    right = {name: outcome.right for name, outcome in outcomes.items() if name.startswith("accuracy/")}
    for name, mask in (right | {WORST: survivors(outcomes)}).items():
        low, high = wilson(int(mask.sum()), len(mask))
        flat |= {name: float(mask.double().mean()), f"{name}/low": low, f"{name}/high": high}
    return flat


def describe(attacks: Sequence[AttackSpec], outcomes: Mapping[str, Outcome], *, seed: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """Record of each accuracy: everything needed to repeat the measurement, and its passes. The worst case lists the cascade."""
    run, threat_model = {"seed": seed, "batch_size": batch_size}, next(attack.threat_model for attack in attacks if attack.kept)
    described = {}
    for attack in (attack for attack in attacks if not attack.left_only):
        outcome = outcomes[attack.name]
        made = {**attack.settings, "restarts": attack.restarts, **run, **_passes(outcome)} if attack.craft else {}
        described[attack.name] = _counts(outcome.right) | made
    return described | {WORST: _worst_case(attacks, outcomes, threat_model, run)}


def describe_kept(attack: AttackSpec, count: int, *, seed: int, batch_size: int) -> dict[str, Any]:
    """Record of the stored adversarial images, which are those of the first restart."""
    return {"n": count, **attack.settings, "restarts": 1, "seed": seed, "batch_size": batch_size}


def _worst_case(
    attacks: Sequence[AttackSpec], outcomes: Mapping[str, Outcome], threat_model: ThreatModel, run: Mapping[str, int]
) -> dict[str, Any]:
    """Record of the cascade: for each attack, the number of images attacked, and the number that it was the first to break."""
    standing = survivors({attacks[0].name: outcomes[attacks[0].name]})
    steps = []
    for attack in attacks[1:]:
        outcome = outcomes[attack.name]
        broken = int((standing[outcome.rows] & ~outcome.right).sum())
        standing[outcome.rows] &= outcome.right
        step = {"name": attack.name.split("/")[1], "aimed_at": len(outcome.rows), "broke": broken}
        steps.append(step | {**attack.settings, "restarts": attack.restarts, **_passes(outcome)})
    spent = {name: sum(step[name] for step in steps) for name in PASSES}
    return _counts(standing) | {"attack": "cascade", **ball(threat_model), **run, **spent, "cascade": steps}


def _counts(right: Tensor) -> dict[str, Any]:
    return {"n": len(right), "correct": int(right.sum()), "interval": list(wilson(int(right.sum()), len(right)))}


def _passes(outcome: Outcome) -> dict[str, int]:
    """Forward and backward passes, summed over images."""
    return {name: round(float(getattr(outcome, name).double().sum())) for name in PASSES}
