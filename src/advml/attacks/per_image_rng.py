"""Random numbers per image: they depend on the image and a seed, not on the batch.

So an attack's result for an image is the same, up to rounding, whether it is attacked alone, with all others, or with the few that are
not broken yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from advml.core import ranks
from advml.core.device import derived_seed

# (images (N, C, H, W), of which only the shape matters; generator) -> random numbers (N, C, H, W), on the generator's device
Sample = Callable[[Tensor, torch.Generator], Tensor]


class PerImageGenerator:
    """Replacement of a `torch.Generator` that keeps one generator per image, each of which continues after its last draw.

    Args:
        seed: any number. With an image's grey levels it seeds that image's generator; images whose pixels round to the same grey levels
            draw the same numbers.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def seed_of(self, image: Tensor) -> int:
        """Seed of the generator of an image (C, H, W) in [0, 1]; independent of device, memory format and precision."""
        (name,) = _names(image[None])
        return self._generator(name).initial_seed()

    def draw(self, sample: Sample, images: Tensor) -> Tensor:
        """Draw `sample` for each image (N, C, H, W) in [0, 1]; returns (N, C, H, W) on the CPU."""
        names, found = _names(images), {}
        for row, name in enumerate(names):
            if name not in found:
                found[name] = sample(images[row : row + 1], self._generator(name))
        return torch.cat([found[name] for name in names]) if names else torch.zeros(images.shape)

    def _generator(self, name: str) -> torch.Generator:
        if name not in self._generators:
            self._generators[name] = torch.Generator().manual_seed(derived_seed(self.seed, name))
        return self._generators[name]


Randomness = torch.Generator | PerImageGenerator  # one for the whole batch, or one for each image


def drawn(sample: Sample, images: Tensor, generator: Randomness) -> Tensor:
    """Draw `sample` for images (N, C, H, W) on the generator's device; `PerImageGenerator` draws on the CPU."""
    if isinstance(generator, PerImageGenerator):
        return generator.draw(sample, images)
    whole = images.new_empty(1).expand(ranks.batch_size(len(images)), *images.shape[1:])
    return ranks.own(sample(whole, generator))


def _names(images: Tensor) -> list[str]:
    """Hash of each image's grey levels; not of its floats, because devices round the division by 255 differently."""
    levels = (255 * images.detach().float()).round().clamp(0, 255).to(device="cpu", dtype=torch.uint8).contiguous()
    return [hashlib.blake2b(image.numpy(), digest_size=16).hexdigest() for image in levels]
