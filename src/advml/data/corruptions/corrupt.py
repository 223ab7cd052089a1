"""Corrupt test images on the fly.

    >>> corrupted = corrupt("fog", images, severity=3, seed=0)      # uint8 (N, C, H, W) -> the same

Every image draws its random numbers from a generator of its own, so it looks the same in any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from advml.data.corruptions import blur, digital, noise, weather
from advml.data.corruptions.severities import constants
from advml.runtime.machine import generator_for

VALUES_AT_ONCE = 2**21  # floats; keeps memory low and the caches warm


@dataclass(frozen=True)
class Corruption:
    """`function(images, generators, *constants)` on float32 (N, C, H, W) in [0, 1]; `kind` groups them as in the paper."""

    kind: Literal["noise", "blur", "weather", "digital"]
    function: Callable[..., np.ndarray]


# In the paper's order. To add one, add a row here, to both tables of `severities`, and to `config.CorruptionName`.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption("noise", noise.gaussian_noise),
    "shot_noise": Corruption("noise", noise.shot_noise),
    "impulse_noise": Corruption("noise", noise.impulse_noise),
    "defocus_blur": Corruption("blur", blur.defocus_blur),
    "glass_blur": Corruption("blur", blur.glass_blur),
    "motion_blur": Corruption("blur", blur.motion_blur),
    "zoom_blur": Corruption("blur", blur.zoom_blur),
    "snow": Corruption("weather", weather.snow),
    "frost": Corruption("weather", weather.frost),
    "fog": Corruption("weather", weather.fog),
    "brightness": Corruption("weather", weather.brightness),
    "contrast": Corruption("digital", digital.contrast),
    "elastic_transform": Corruption("digital", digital.elastic_transform),
    "pixelate": Corruption("digital", digital.pixelate),
    "jpeg_compression": Corruption("digital", digital.jpeg_compression),
}


def corrupt(name: str, images: Tensor, *, severity: int, seed: int, first: int = 0) -> Tensor:
    """Corrupted copies of images.

    Grey images stay grey: noise is drawn once, and whatever the paper defines by colour takes the one channel. Sides up to 64 pixels
    take the constants of CIFAR-C, larger ones those of ImageNet-C.

    Args:
        name: a key of CORRUPTIONS.
        images: uint8 (N, C, H, W), C = 1 or 3, sides of at least 4.
        severity: 1 to 5.
        seed: of the random numbers.
        first: the first image's number in its split; image i depends on (seed, name, severity, first + i) alone.
    Returns:
        uint8 (N, C, H, W). Deviation: values are rounded to the nearest level; the published scripts round down.
    Raises:
        ValueError: unknown name or severity.
    """
    numbers = constants(name, side=max(images.shape[-2:]), severity=severity)
    parts = []
    for start in range(0, len(images), size := max(1, VALUES_AT_ONCE // images[0].numel() if len(images) else 1)):
        part = images[start : start + size].numpy().astype(np.float32) / 255
        generators = [generator_for("corrupt", seed, name, severity, first + start + row) for row in range(len(part))]
        parts.append(_levels(CORRUPTIONS[name].function(part, generators, *numbers)))
    return torch.from_numpy(np.concatenate(parts)) if parts else images.clone()


def _levels(images: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
