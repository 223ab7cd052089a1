"""Random numbers of each image's own: they follow from the image and a seed, and not from the batch that it is in.

So an attack does the same to an image whether it is attacked alone, among all others, or among the few that are left, up to rounding.
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
    """Stands where a generator could stand, and has one for each image. Like a generator, it goes on where the last draw ended.

    Args:
        seed: any number. Together with an image's grey levels it seeds that image's generator; images of equal grey levels (to half
            a level, where pixels are finer) draw alike.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def seed_of(self, image: Tensor) -> int:
        """The seed of the generator of an image (C, H, W) in [0, 1]: the same on every device, in every layout and precision."""
        (name,) = _names(image[None])
        return self._generator(name).initial_seed()

    def draw(self, sample: Sample, images: Tensor) -> Tensor:
        """`sample` for each of the images (N, C, H, W) in [0, 1] -> (N, C, H, W) on the CPU."""
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
    """What `sample` gives for the images (N, C, H, W), on the generator's device; `PerImageGenerator` draws on the CPU."""
    if isinstance(generator, PerImageGenerator):
        return generator.draw(sample, images)
    whole = images.new_empty(1).expand(ranks.batch_size(len(images)), *images.shape[1:])
    return ranks.own(sample(whole, generator))


def _names(images: Tensor) -> list[str]:
    """A hash of the grey levels of each image. Of those, not of the floats: devices divide by 255 with different rounding."""
    levels = (255 * images.detach().float()).round().clamp(0, 255).to(device="cpu", dtype=torch.uint8).contiguous()
    return [hashlib.blake2b(image.numpy(), digest_size=16).hexdigest() for image in levels]
