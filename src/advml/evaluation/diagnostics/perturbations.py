"""The samples that probes perturb: those that the clean model gets right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advml.attacks.pgd import default_step_size, finite, pgd
from advml.attacks.threat import NORMS, ThreatModel
from advml.evaluation.diagnostics.target import Target
from advml.runtime.machine import generator_for
from advml.training.objectives import cross_entropy, margin

NOISE_DRAWS = 100  # half of them uniform in the ball, half on its boundary (for linf: at its corners)
SHORT = 0.1  # of epsilon: the step over which a gradient should foretell the loss
SMALL_BATCH = 16  # where verdicts are checked again


@dataclass(frozen=True)
class Attacked:
    """What PGD made of the samples."""

    images: Tensor  # (n, C, H, W)
    logits: Tensor  # (n, K)
    right: Tensor  # bool (n,)
    margins: Tensor  # (steps + 1, n): the largest so far


@dataclass(frozen=True)
class Samples:
    """n images (n, C, H, W) with labels (n,), a target, and how to go about it. Every probe draws from `seed` alone."""

    target: Target
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int

    def pgd(self, threat_model: ThreatModel, *, steps: int) -> Attacked:
        """The iterate of largest cross-entropy, from a random start; with one step FGSM, from the image."""
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
        """bool (n,): right under every one of NOISE_DRAWS draws; and (n, C, H, W) the noisy images that are not, else the images."""
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
        """How many samples have a gradient that is exactly zero or not finite."""
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
        """Median of (margin(x + s) - margin(x)) / <gradient, s>, s being SHORT * epsilon along the gradient, within the box.

        1 for a linear model, near 1 wherever a gradient says what the model does; None without any gradient.
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
        """Logits (n, K) of adversarial images in a fresh copy, among clean ones of the same class, in small batches.

        Whoever judges by the company, as batch norm in train mode does, judges differently here.
        """
        n = len(self.labels)
        mixed, labels = torch.cat([adversarial, self.images]), torch.cat([self.labels, self.labels])
        order = torch.randperm(2 * n, generator=generator_for("diagnostics", "again", self.seed)).to(mixed.device)
        order = order[labels[order].argsort(stable=True)]
        parts = [fresh.logits(mixed[order[rows]]) for rows in batches(2 * n, SMALL_BATCH)]
        return torch.cat(parts)[order.argsort()][:n] if parts else mixed.new_zeros(0)


def batches(n: int, size: int) -> list[Tensor]:
    """Row numbers 0 .. n - 1 in nearly equal parts, so that no batch is much smaller than the others."""
    return list(torch.arange(n).tensor_split(math.ceil(n / size))) if n else []
