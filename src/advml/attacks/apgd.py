"""AutoAttack's APGD (Croce and Hein 2020) with random starts of each image's own."""

from __future__ import annotations

from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from advml.attacks.draws import PerImage, Sample

# The library's own draws, by its name of the norm; it stretches them to the surface of the ball.
SAMPLES: dict[str, Sample] = {
    "Linf": lambda like, generator: 2 * torch.rand(like.shape, generator=generator) - 1,
    "L2": lambda like, generator: torch.randn(like.shape, generator=generator),
}


class _OwnStarts:
    """Gives each run of the library's loop the start that the library would draw for an image that it attacks alone.

    `seed` of the library's attack is then `PerImage(seed).seed_of(image)`.
    """

    def __init__(self, *arguments: Any, seed: int, **settings: Any) -> None:
        super().__init__(*arguments, seed=seed, **settings)
        self.draws = PerImage(seed)

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if x_init is None:
            x_init = x + self.eps * self.normalize(self.draws.draw(SAMPLES[self.norm], x).to(x))
        return super().attack_single_run(x, y, x_init)


class APGD(_OwnStarts, APGDAttack):
    """APGD on cross-entropy."""


class TargetedAPGD(_OwnStarts, APGDAttack_targeted):
    """APGD on the targeted DLR loss, one target after another."""
