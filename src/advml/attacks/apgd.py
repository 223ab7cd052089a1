"""AutoAttack's APGD (Croce and Hein 2020) with random starts of each image's own."""

from __future__ import annotations

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from advml.attacks.draws import PerImage, Sample
from advml.attacks.threat import NORMS

# What the library draws, by its name of the norm, before it stretches that to the surface of the ball.
SAMPLES: dict[str, Sample] = {
    "Linf": NORMS["linf"].sample,
    "L2": lambda like, generator: torch.randn(like.shape, generator=generator),
}


class _OwnStarts:
    """Gives each run of the library's loop the starts that the library would draw for each image alone, one run after another.

    `seed` of the library's attack on an image alone is then `PerImage(seed).seed_of(image)`. For L-infinity and L2.
    """

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W) of x in [0, 1] with classes y (N,); those that do not break come back as they were."""
        self.draws = PerImage(self.seed)
        return super().perturb(x, y)

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The library draws a start for the batch as well, and passes it over for this one."""
        start = x + self.eps * self.normalize(self.draws.draw(SAMPLES[self.norm], x).to(x))
        return super().attack_single_run(x, y, start)


class APGD(_OwnStarts, APGDAttack):
    """APGD on cross-entropy."""


class TargetedAPGD(_OwnStarts, APGDAttack_targeted):
    """APGD on the targeted DLR loss, one target after another."""
