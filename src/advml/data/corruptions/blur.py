"""Blur. Images are float32 (N, C, H, W) in [0, 1]; lengths are pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.ndimage import convolve, gaussian_filter

from advml.data.corruptions.fields import Generators, smear, uniform, zoom


def defocus_blur(images: np.ndarray, generators: Generators, radius: float, softness: float) -> np.ndarray:
    """Convolution with a disc of this radius whose edge is softened by a normal curve; borders are mirrored."""
    kernel = _disc(radius, softness)
    reach = len(kernel) // 2
    padded = np.pad(images, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    transform = np.fft.rfft2(kernel, padded.shape[-2:])
    # Image by image, as in all that is not elementwise: a transform of many lines at once may group them by their number.
    products = [np.fft.irfft2(np.fft.rfft2(image) * transform, padded.shape[-2:]) for image in padded]
    return np.stack(products)[..., 2 * reach :, 2 * reach :]


@cache
def _disc(radius: float, softness: float) -> np.ndarray:
    """Pixels within the radius, then 3 x 3 (above a radius of 8: 5 x 5) weights of a normal curve; sum 1."""
    edge = 1 if radius <= 8 else 2
    reach = int(radius) + edge
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (rows**2 + columns**2 <= radius**2).astype(float)
    curve = np.exp(-(np.arange(-edge, edge + 1) ** 2) / (2 * softness**2))
    soft = convolve(disc, np.outer(curve, curve), mode="constant")
    return (soft / soft.sum()).astype(np.float32)


def glass_blur(images: np.ndarray, generators: Generators, sigma: float, reach: float, rounds: float) -> np.ndarray:
    """A normal blur, pixels that show one at most `reach` away, and the same blur again: frosted glass.

    The paper speaks of shuffling; the published script copies, one pixel after another, and so do we.
    """
    count, _, height, width = images.shape
    blurred = gaussian_filter(images, sigma, mode="nearest", axes=(-2, -1)).reshape(count, -1, height * width)
    for _ in range(int(rounds)):
        sources = _sources(np.floor(uniform(generators, (2, height, width), -reach, reach)).astype(int), int(reach))
        blurred = np.take_along_axis(blurred, sources[:, None], 2)
    return gaussian_filter(blurred.reshape(images.shape), sigma, mode="nearest", axes=(-2, -1))


def _sources(offsets: np.ndarray, reach: int) -> np.ndarray:
    """Which pixel each pixel ends up showing: (N, H * W), row by row.

    From the last pixel to the first, each copies what the one at its offset (N, 2, H, W) shows by then, which may be a copy too.
    A rim stays as it is, one pixel wider at the top and left, as published.
    """
    height, width = offsets.shape[-2:]
    rows, columns = np.indices((height, width))
    inside = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    offsets = np.where(inside, offsets, 0)
    sources = ((rows + offsets[:, 0]) * width + columns + offsets[:, 1]).reshape(len(offsets), -1)
    copied = (sources > np.arange(height * width)) & np.take(inside.ravel(), sources)  # the source has been written before
    while copied.any():  # twice as far along the chain of copies each time
        further = np.take_along_axis(sources, sources, 1)
        sources, copied = np.where(copied, further, sources), copied & np.take_along_axis(copied, sources, 1)
    return sources


def motion_blur(images: np.ndarray, generators: Generators, radius: float, sigma: float) -> np.ndarray:
    """A trail in a direction uniform in +-45 degrees from the right: see `smear`."""
    angles = uniform(generators, (1,), -45, 45)[:, 0]
    return smear(images, angles, radius=radius, sigma=sigma)


def zoom_blur(images: np.ndarray, generators: Generators, furthest: float, step: float) -> np.ndarray:
    """The mean of the image and of its enlargements by 1, 1 + step, ..., 1 + furthest: moving towards the scene."""
    factors = 1 + step * np.arange(round(furthest / step) + 1)
    return (images + sum(zoom(images, factor) for factor in factors)) / np.float32(len(factors) + 1)
