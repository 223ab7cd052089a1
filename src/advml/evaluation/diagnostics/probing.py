"""Probes that show whether a model's gradients lead attacks to its weak spots or astray.

After Athalye et al. 2018 (sec. 3.1), Carlini et al. 2019 (sec. 3 and 4) and Pintor et al. 2022. They measure; `diagnostics` judges.

Cost per sample, that is an image that the clean model gets right, with S steps and E epsilons (6 by default): E S + 5 gradients, each
a forward and a backward pass, and at most 2 E + 106 forward passes more: random noise leaves alone what it has broken. Every image
costs 2 forward passes more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from advml.attacks.guard import borrowed
from advml.attacks.threat import ThreatModel
from advml.evaluation.diagnostics.evidence import Evidence, Point, Rise
from advml.evaluation.diagnostics.perturbations import Attacked, Samples, batches
from advml.evaluation.diagnostics.target import Target
from advml.evaluation.intervals import binomial_tail, wilson
from advml.runtime.machine import derived_seed, own_randomness

RANDOM_NOISE = "random noise"  # its name among the black-box attacks


def probe(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat_model: ThreatModel,
    classes: int,
    steps: int,
    seed: int,
    shares: Sequence[float] = (0.25, 0.5, 1, 2, 4),
    white_box: Tensor | None = None,
    black_box: Mapping[str, Tensor] | None = None,
    batch_size: int = 500,
    on_broken: Callable[[str, Tensor, Tensor], None] = lambda probe, rows, images: None,
) -> Evidence:
    """Measure what the rules of `diagnostics` judge. The model, its modes and gradients, and the global RNG stay as they are.

    Args:
        model: maps images (n, C, H, W) in [0, 1] to logits (n, classes); is copied where it can be, and judged in eval mode. It need not
            be differentiable, deterministic, or independent of the batch: that is what is found out.
        images, labels: the subset, (N, C, H, W) in [0, 1] and (N,), on the model's device.
        threat_model: the ball in which the figure was measured.
        steps: of each PGD, from a random start, with steps of 2.5 * epsilon / steps.
        shares: multiples of epsilon for the curve; epsilon itself and the one that spans the box are always on it.
        white_box: bool (N,), right after all white-box attacks that the figure rests on; None: the probes' own.
        black_box: name -> bool (N,), right after an attack without gradients of this model: Square, or transfer.
        on_broken: told what "probe-pgd", "probe-step" and "probe-noise" break within epsilon: rows (m,) and images (m, C, H, W).
    Raises:
        UserError: the model fails on a batch.
        ValueError: shapes disagree.
    """
    black_box = dict(black_box or {})
    for given in (labels, *black_box.values(), *([] if white_box is None else [white_box])):
        if given.shape != (len(images),):
            raise ValueError(f"one value per image is needed: {len(images)} images, shape {tuple(given.shape)}")
    with own_randomness(derived_seed("diagnostics", seed), images.device), borrowed(model) as own, borrowed(model) as other:
        target, fresh = Target(own), Target(other)
        first, second = (torch.cat([target.logits(images[rows]) for rows in batches(len(images), batch_size)]) for _ in range(2))
        if first.shape[1] != classes:
            raise ValueError(f"the model gives {first.shape[1]} outputs, for {classes} classes")
        chosen = (first.argmax(1) == labels).nonzero().squeeze(1)
        samples = Samples(target, images[chosen], labels[chosen], seed, batch_size)
        curve = {size: samples.pgd(ThreatModel(threat_model.norm, size), steps=steps) for size in _epsilons(threat_model, shares, images)}
        plain, single = curve[threat_model.epsilon], samples.pgd(threat_model, steps=1)
        white = plain.right & single.right & (True if white_box is None else white_box.to(images.device)[chosen])
        quiet, noisy = samples.noise(threat_model)
        within = [("probe-pgd", found.right, found.images) for size, found in curve.items() if size <= threat_model.epsilon]
        for name, right, adversarial in (*within, ("probe-step", single.right, single.images), ("probe-noise", quiet, noisy)):
            on_broken(name, chosen[~right], adversarial[~right])
        after = {RANDOM_NOISE: quiet} | {name: right.to(images.device)[chosen] for name, right in black_box.items()}
        again = samples.again(fresh, plain.images)
        return Evidence(
            norm=threat_model.norm,
            epsilon=threat_model.epsilon,
            steps=steps,
            seed=seed,
            classes=classes,
            largest_class=float(labels.bincount().max() / len(labels)) if len(labels) else 0.0,
            images=len(images),
            n=len(chosen),
            curve=_points(curve, n=len(chosen), images=len(images)),
            rise=_rise(curve),
            single_step_only=_count(~single.right & plain.right),
            multi_step_only=_count(single.right & ~plain.right),
            white_box_right=_count(white),
            black_box={name: _count(white & ~right) for name, right in after.items()},
            **samples.gradients(threat_model),
            slope_kept=samples.slope_kept(threat_model),
            gradient_error=target.error,
            margins=tuple(plain.margins[:, plain.right].mean(1).tolist()) if plain.right.any() else (),
            survivors=_count(plain.right),
            broken=_count(~plain.right),
            lost=_count(~plain.right & (again.argmax(-1) == samples.labels)) if len(chosen) else 0,
            batch_difference=_difference(plain.logits, again),
            output_difference=_difference(first, second),
            predictions_changed=_count(first.argmax(1) != second.argmax(1)),
            output_low=float(first.min()),
            output_sum=float(first.sum(1).mean()),
            output_sum_spread=float(first.sum(1).amax() - first.sum(1).amin()),
            output_log_sum_exp=float(first.logsumexp(1).abs().max()),
            forward=(target.forward + fresh.forward) / max(1, len(chosen)),
            backward=target.backward / max(1, len(chosen)),
        )


def _epsilons(threat_model: ThreatModel, shares: Sequence[float], images: Tensor) -> list[float]:
    """Multiples of epsilon up to the one at which every image reaches every other: 1 in linf, sqrt(C * H * W) in l2."""
    box = 1.0 if threat_model.norm == "linf" else math.sqrt(images.shape[1:].numel())
    epsilon, widest = threat_model.epsilon, max(box, threat_model.epsilon)
    return sorted({share * epsilon for share in shares if 0 < share * epsilon < widest} | {epsilon, widest})


def _points(curve: Mapping[float, Attacked], *, n: int, images: int) -> tuple[Point, ...]:
    counts = {0.0: n} | {epsilon: _count(attacked.right) for epsilon, attacked in curve.items()}
    return tuple(Point(epsilon, count, count / images, *wilson(count, images)) for epsilon, count in counts.items())


def _rise(curve: Mapping[float, Attacked]) -> Rise:
    """The pair of epsilons with the least likely number of regained samples."""
    pairs = list(combinations(curve.items(), 2)) or [tuple(curve.items()) * 2]
    rises = (
        Rise(smaller, larger, _count(~before.right & after.right), _count(before.right & ~after.right), len(pairs))
        for (smaller, before), (larger, after) in pairs
    )
    return min(rises, key=lambda rise: binomial_tail(rise.regained, rise.regained + rise.lost, share=0.5))


def _difference(first: Tensor, second: Tensor) -> float:
    """Largest |first - second|, relative to the largest |first|; NaN equals NaN."""
    if not len(first):
        return 0.0
    scale = first[first.isfinite()].abs()
    largest = float(scale.max()) if len(scale) else 0.0
    return float((first - second).abs().nan_to_num(nan=0, posinf=torch.inf).max()) / max(largest, 1e-12)


def _count(which: Tensor) -> int:
    return int(which.sum())
