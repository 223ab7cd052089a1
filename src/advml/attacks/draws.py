"""Random numbers of each image's own: they follow from the image and a seed, and not from the batch that it is in.

So an attack does the same to an image whether it is attacked alone, among all others, or among the few that are left, up to rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from advml.runtime.machine import derived_seed

# (images (N, C, H, W), of which only the shape matters; generator) -> random numbers, drawn on the CPU
Sample = Callable[[Tensor, torch.Generator], Tensor]


class PerImage:
    """Stands where a generator could stand, and has one for each image. Like a generator, it goes on where the last draw ended.

    Args:
        seed: any number. Together with an image's pixels it seeds that image's generator; equal images draw alike.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def seed_of(self, image: Tensor) -> int:
        """The seed of this image's (C, H, W) generator: the same for any memory layout, precision that holds it, and device."""
        return derived_seed(self.seed, _fingerprint(image.detach().cpu().float().contiguous()))

    def draw(self, sample: Sample, images: Tensor) -> Tensor:
        """`sample` for each of the images (N, C, H, W)."""
        pixels, drawn = images.detach().cpu().float().contiguous(), {}
        names = [_fingerprint(image) for image in pixels]
        for row, name in enumerate(names):
            if name not in drawn:
                drawn[name] = sample(images[row : row + 1], self._generator(name))
        return torch.cat([drawn[name] for name in names]) if names else torch.zeros(images.shape)

    def _generator(self, name: str) -> torch.Generator:
        if name not in self._generators:
            self._generators[name] = torch.Generator().manual_seed(derived_seed(self.seed, name))
        return self._generators[name]


Randomness = torch.Generator | PerImage  # one for the whole batch, or one for each image


def drawn(sample: Sample, images: Tensor, source: Randomness) -> Tensor:
    """What `sample` gives for the images (N, C, H, W), on the CPU."""
    return source.draw(sample, images) if isinstance(source, PerImage) else sample(images, source)


def _fingerprint(pixels: Tensor) -> str:
    """Of contiguous float32 pixels on the CPU."""
    return hashlib.blake2b(pixels.numpy(), digest_size=16).hexdigest()
