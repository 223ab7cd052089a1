"""Noise: per value, so the channels of a pixel differ. Images are float32 (N, C, H, W) in [0, 1]; results may leave [0, 1]."""

from __future__ import annotations

import numpy as np
import torch

from advml.data.corruptions.fields import Generators, normal, uniform


def gaussian_noise(images: np.ndarray, generators: Generators, deviation: float) -> np.ndarray:
    """x + deviation * z, z standard normal: poor light."""
    return images + deviation * normal(generators, images.shape[1:])


def shot_noise(images: np.ndarray, generators: Generators, photons: float) -> np.ndarray:
    """Poisson(photons * x) / photons: light arrives in grains."""
    rates = torch.from_numpy(images * np.float32(photons))
    counts = [torch.poisson(rate, generator=generator).numpy() for rate, generator in zip(rates, generators, strict=True)]
    return np.stack(counts) / np.float32(photons)


def impulse_noise(images: np.ndarray, generators: Generators, share: float) -> np.ndarray:
    """A share of the values becomes 0 or 1, half each: salt and pepper."""
    drawn = uniform(generators, images.shape[1:])
    return np.where(drawn < share / 2, 0, np.where(drawn >= 1 - share / 2, 1, images)).astype(np.float32)
