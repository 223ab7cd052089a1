"""Probes for gradient masking, which measure whether a model's gradients are useful to attacks; `rules` raises flags from the results.

After Athalye et al. 2018 (sec. 3.1), Carlini et al. 2019 (sec. 3 and 4) and Pintor et al. 2022.

Cost per sample (an image that is correct when clean), with S steps and E epsilons (6 by default): E S + 5 gradients, each a forward and
a backward pass, and at most 2 E + 106 further forward passes (fewer once random noise has broken a sample). Every image costs 2 forward
passes in addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from advml.attacks.isolation import frozen_copy
from advml.attacks.pgd import Objective, default_step_size, finite, pgd
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.core.device import derived_seed, generator_for, own_randomness
from advml.evaluation.intervals import binomial_tail, wilson
from advml.evaluation.masking.evidence import SHORT, Evidence, Point, Rise
from advml.models.adapter import Foreign
from advml.training.losses import cross_entropy, margin

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
    """Run all probes on a model. The model, its modes and gradients, and the global RNG are restored.

    Args:
        model: maps images (n, C, H, W) in [0, 1] to logits (n, classes); copied if possible, and used in eval mode. It need not be
            differentiable, deterministic, or independent of the batch: the probes test that.
        images, labels: the subset, (N, C, H, W) in [0, 1] and (N,), on the model's device.
        threat_model: the ball in which robust accuracy was measured.
        steps: of each PGD, from a random start, with step size 2.5 * epsilon / steps.
        shares: multiples of epsilon for the security curve; epsilon itself and the one that spans the box are always included.
        white_box: bool (N,), correct after all white-box attacks of the evaluation; None: after those of the probes.
        black_box: name -> bool (N,), correct after an attack that uses no gradients of this model: Square, or transfer.
        on_broken: called with rows (m,) and images (m, C, H, W) that "probe-pgd", "probe-step" and "probe-noise" break within epsilon.
    Raises:
        UserError: the model fails on a batch.
        ValueError: shapes do not match.
    """
    black_box = dict(black_box or {})
    for given in (labels, *black_box.values(), *([] if white_box is None else [white_box])):
        if given.shape != (len(images),):
            raise ValueError(f"one value per image is needed: {len(images)} images, shape {tuple(given.shape)}")
    with own_randomness(derived_seed("diagnostics", seed), images.device), frozen_copy(model) as own, frozen_copy(model) as other:
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
    """Epsilons of the curve, up to the one at which every image reaches every other: 1 in linf, sqrt(C * H * W) in l2."""
    box = 1.0 if threat_model.norm == "linf" else math.sqrt(images.shape[1:].numel())
    epsilon, widest = threat_model.epsilon, max(box, threat_model.epsilon)
    return sorted({share * epsilon for share in shares if 0 < share * epsilon < widest} | {epsilon, widest})


def _points(curve: Mapping[float, Attacked], *, n: int, images: int) -> tuple[Point, ...]:
    counts = {0.0: n} | {epsilon: _count(attacked.right) for epsilon, attacked in curve.items()}
    return tuple(Point(epsilon, count, count / images, *wilson(count, images)) for epsilon, count in counts.items())


def _rise(curve: Mapping[float, Attacked]) -> Rise:
    """Pair of epsilons with the most significant number of regained samples."""
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


# Samples that the probes perturb: images that are correct when clean

NOISE_DRAWS = 100  # half of them uniform in the ball, half on its boundary (for linf: at its corners)
SMALL_BATCH = 16  # batch size in which results are checked again


@dataclass(frozen=True)
class Attacked:
    """Result of PGD on the samples."""

    images: Tensor  # (n, C, H, W)
    logits: Tensor  # (n, K)
    right: Tensor  # bool (n,)
    margins: Tensor  # (steps + 1, n): the largest so far


@dataclass(frozen=True)
class Samples:
    """Samples (n, C, H, W) with labels (n,), the model, and the settings of the probes. Random numbers depend only on `seed`."""

    target: Target
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int

    def pgd(self, threat_model: ThreatModel, *, steps: int) -> Attacked:
        """PGD on cross-entropy from a random start, keeping the best iterate; with one step, FGSM from the image."""
        parts = [self._pgd(rows, number, threat_model, steps) for number, rows in enumerate(batches(len(self.labels), self.batch_size))]
        if not parts:
            none = self.images.new_zeros(0)
            return Attacked(self.images, none, none.bool(), none.view(0, 0))
        images, logits, margins = zip(*parts, strict=True)
        logits = torch.cat(logits)
        return Attacked(torch.cat(images), logits, logits.argmax(1) == self.labels, torch.cat(margins, dim=1))

    def _pgd(self, rows: Tensor, number: int, threat_model: ThreatModel, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, margins = self.images[rows], self.labels[rows], []
        generator = generator_for("diagnostics", "pgd", self.seed, threat_model.epsilon, number)
        adversarial = pgd(
            self.target.objective(partial(cross_entropy, labels=labels), watch=lambda logits: margins.append(margin(logits, labels))),
            images,
            threat_model=threat_model,
            steps=steps,
            step_size=default_step_size(threat_model.epsilon, steps),
            start=threat_model.random_start(images, generator=generator) if steps > 1 else None,
            keep="best" if steps > 1 else "last",
        )
        return adversarial, self.target.logits(adversarial), torch.stack(margins).cummax(0).values

    def noise(self, threat_model: ThreatModel) -> tuple[Tensor, Tensor]:
        """Mask (n,) of samples that stay correct under NOISE_DRAWS random draws, and (n, C, H, W) a noisy image for each other sample."""
        right, images = torch.ones_like(self.labels, dtype=torch.bool), self.images.clone()
        for draw in range(NOISE_DRAWS):
            generator = generator_for("diagnostics", "noise", self.seed, draw)
            if draw % 2:
                direction = NORMS[threat_model.norm].steepest(torch.randn(self.images.shape, generator=generator)).to(self.images)
                noisy = threat_model.project(self.images + threat_model.epsilon * direction, self.images)
            else:
                noisy = threat_model.random_start(self.images, generator=generator)
            left = right.nonzero().squeeze(1)
            for rows in (left[part] for part in batches(len(left), self.batch_size)):
                right[rows] = self.target.logits(noisy[rows]).argmax(1) == self.labels[rows]
            broken = left[~right[left]]
            images[broken] = noisy[broken]
        return right, images

    def gradients(self, threat_model: ThreatModel) -> dict[str, int]:
        """Numbers of samples whose gradient is exactly zero or not finite."""
        start = threat_model.random_start(self.images, generator=generator_for("diagnostics", "gradients", self.seed))
        places = {"zero_clean": (self.images, cross_entropy), "zero_random": (start, cross_entropy), "zero_margin": (self.images, margin)}
        counts, bad = dict.fromkeys(places, 0), torch.zeros_like(self.labels, dtype=torch.bool)
        for rows in batches(len(self.labels), self.batch_size):
            for name, (images, loss) in places.items():
                gradient = self.target.gradient(partial(loss, labels=self.labels[rows]), images[rows])[-1].flatten(1)
                counts[name] += int((gradient == 0).all(1).sum())
                bad[rows] |= ~gradient.isfinite().all(1)
        return counts | {"non_finite": int(bad.sum())}

    def slope_kept(self, threat_model: ThreatModel) -> float | None:
        """Median of (margin(x + s) - margin(x)) / <gradient, s> for a step s of SHORT * epsilon along the gradient, within the box.

        1 for a linear model, near 1 if gradients predict the change of the margin; None if there are no gradients.
        """
        kept = []
        for rows in batches(len(self.labels), self.batch_size):
            images, labels = self.images[rows], self.labels[rows]
            _, before, gradient = self.target.gradient(partial(margin, labels=labels), images)
            gradient = finite(gradient)
            moved = threat_model.ascend(images, gradient, images, step_size=SHORT * threat_model.epsilon)
            promised = ((moved - images) * gradient).flatten(1).sum(1)
            gained = margin(self.target.logits(moved), labels) - before
            kept.append((gained / promised)[promised > 0])
        ratios = torch.cat(kept) if kept else torch.empty(0)
        ratios = ratios[ratios.isfinite()]
        return float(ratios.median()) if len(ratios) else None

    def again(self, fresh: Target, adversarial: Tensor) -> Tensor:
        """Logits (n, K) of adversarial images from a fresh copy of the model, in small batches with clean images of the same class.

        They differ from the earlier ones if the output depends on the batch, as with batch norm in train mode.
        """
        n = len(self.labels)
        mixed, labels = torch.cat([adversarial, self.images]), torch.cat([self.labels, self.labels])
        order = torch.randperm(2 * n, generator=generator_for("diagnostics", "again", self.seed)).to(mixed.device)
        order = order[labels[order].argsort(stable=True)]
        parts = [fresh.logits(mixed[order[rows]]) for rows in batches(2 * n, SMALL_BATCH)]
        return torch.cat(parts)[order.argsort()][:n] if parts else mixed.new_zeros(0)


def batches(n: int, size: int) -> list[Tensor]:
    """Rows 0 .. n - 1 in batches of nearly equal size, at most `size`."""
    return list(torch.arange(n).tensor_split(math.ceil(n / size))) if n else []


# The model under test: errors in its backward pass become zero gradients, and all passes are counted

Loss = Callable[[Tensor], Tensor]  # logits (N, K) -> values (N,)


class Target:
    """The model under test, in eval mode and frozen, wrapped in `Foreign`.

    Models that round, detach, or compute outside of PyTorch have no gradient; it is then replaced by zero.

    Attributes:
        forward, backward: number of images that have passed so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model if isinstance(model, Foreign) else Foreign(model, memory_format=torch.preserve_format)
        self.model.gradient_error = None
        self.forward = self.backward = 0

    @property
    def error(self) -> str | None:
        """Message of the first error in computing a gradient; None if there was none."""
        return self.model.gradient_error

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W), in float32."""
        self.forward += len(images)
        return self.model(images).float()

    def gradient(self, loss: Loss, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), values (N,) of `loss(logits)`, and the unmodified gradient of the values with respect to the images."""
        images = images.detach().requires_grad_()
        self.forward += len(images)
        self.backward += len(images)
        with torch.enable_grad():
            logits = self.model(images).float()
            values = loss(logits)
            with torch.autocast(images.device.type, enabled=False):  # as in `pgd`
                (gradient,) = torch.autograd.grad(values.sum(), images)
        return logits.detach(), values.detach(), gradient

    def objective(self, loss: Loss, *, watch: Callable[[Tensor], None] = lambda logits: None) -> Objective:
        """Objective for `pgd`: values of `loss`, with non-finite entries of the gradient set to 0, and NaN values to -inf (never the best).

        Args:
            watch: called with the logits (N, K) of every iterate.
        """

        def objective(images: Tensor) -> Tensor:
            if not images.requires_grad:
                logits, slope = self.logits(images), 0
                values = loss(logits)
            else:
                logits, values, gradient = self.gradient(loss, images)
                slope = ((images - images.detach()) * finite(gradient)).flatten(1).sum(1)  # value 0, with that gradient
            values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            watch(logits)
            return values + slope

        return objective
