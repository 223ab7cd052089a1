"""The threat model: a norm ball around the image, cut by the box [0, 1] in which images live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advml.attacks.per_image_rng import Randomness, Sample, drawn


def _over_images(norms: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1), so that it multiplies images."""
    return norms.view(-1, *[1] * (like.ndim - 1))


def _unit_l2(delta: Tensor) -> Tensor:
    return delta / _over_images(delta.flatten(1).norm(dim=1).clamp(min=1e-12), delta)


def _shrink_l2(delta: Tensor, epsilon: float) -> Tensor:
    return delta * _over_images((epsilon / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1.0), delta)


def _sample_linf(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=generator.device) * 2 - 1


def _sample_l2(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the unit ball: a Gaussian direction, a radius u^(1/dimension)."""
    direction = _unit_l2(torch.randn(like.shape, generator=generator, device=generator.device))
    radius = torch.rand(len(like), generator=generator, device=generator.device) ** (1 / like.shape[1:].numel())
    return direction * _over_images(radius, like)


@dataclass(frozen=True)
class Norm:
    """Operations of a norm that attacks need."""

    steepest: Callable[[Tensor], Tensor]  # gradient -> direction of unit norm that ascends fastest
    shrink: Callable[[Tensor, float], Tensor]  # perturbation -> nearest one in the ball
    sample: Sample  # uniform in the unit ball
    size: Callable[[Tensor], Tensor]  # perturbation -> norms (N,)


NORMS: dict[str, Norm] = {
    "linf": Norm(
        steepest=torch.sign,
        shrink=lambda delta, epsilon: delta.clamp(-epsilon, epsilon),
        sample=_sample_linf,
        size=lambda delta: delta.flatten(1).abs().amax(1),
    ),
    "l2": Norm(
        steepest=_unit_l2,
        shrink=_shrink_l2,
        sample=_sample_l2,
        size=lambda delta: delta.flatten(1).norm(dim=1),
    ),
}


@dataclass(frozen=True)
class ThreatModel:
    """Threat model: all x + d with ||d|| <= epsilon and every pixel in [0, 1].

    Attributes:
        norm: a key of NORMS.
        epsilon: radius of the ball; images live in [0, 1], so 8/255 is eight grey levels.
    """

    norm: Literal["linf", "l2"]
    epsilon: float

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Project (N, C, H, W) onto the ball, then onto the box; idempotent, and the result is inside both."""
        return (images + NORMS[self.norm].shrink(adversarial - images, self.epsilon)).clamp(0, 1)

    def ascend(self, adversarial: Tensor, gradient: Tensor, images: Tensor, *, step_size: float) -> Tensor:
        """One projected step of norm `step_size` in the direction of steepest ascent."""
        return self.project(adversarial + step_size * NORMS[self.norm].steepest(gradient), images)

    def random_start(self, images: Tensor, *, generator: Randomness) -> Tensor:
        """Draw uniformly from the ball, then clip to the box.

        Numbers are drawn on the generator's device: a CPU generator gives the same numbers on every device, a generator on the images'
        device needs no transfer.
        """
        delta = drawn(NORMS[self.norm].sample, images, generator).to(images)
        return self.project(images + self.epsilon * delta, images)
