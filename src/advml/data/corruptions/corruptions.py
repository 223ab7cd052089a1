"""Compute common corruptions of test images.

    >>> corrupted = corrupt("fog", images, severity=3, seed=0)      # uint8 (N, C, H, W) -> uint8 (N, C, H, W)

Every image has a random-number generator of its own, so the result for an image does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter
from torch import Tensor

from advml.core.device import generator_for
from advml.data.corruptions.noise_fields import Generators, bilinear, normal, plasma, smear, uniform, zoom
from advml.data.corruptions.severities import constants

# Noise: per value, so the channels of a pixel differ. Images are float32 (N, C, H, W) in [0, 1]; results may leave [0, 1].


def gaussian_noise(images: np.ndarray, generators: Generators, deviation: float) -> np.ndarray:
    """Gaussian noise, as in poor light: x + deviation * z with z standard normal."""
    return images + deviation * normal(generators, images.shape[1:])


def shot_noise(images: np.ndarray, generators: Generators, photons: float) -> np.ndarray:
    """Shot noise, of discrete photons: Poisson(photons * x) / photons."""
    rates = torch.from_numpy(images * np.float32(photons))
    counts = [torch.poisson(rate, generator=generator).numpy() for rate, generator in zip(rates, generators, strict=True)]
    return np.stack(counts) / np.float32(photons)


def impulse_noise(images: np.ndarray, generators: Generators, share: float) -> np.ndarray:
    """Salt-and-pepper noise: a share of the values becomes 0 or 1, half each."""
    drawn = uniform(generators, images.shape[1:])
    return np.where(drawn < share / 2, 0, np.where(drawn >= 1 - share / 2, 1, images)).astype(np.float32)


# Blur. Images are float32 (N, C, H, W) in [0, 1]; lengths are pixels.


def defocus_blur(images: np.ndarray, generators: Generators, radius: float, softness: float) -> np.ndarray:
    """Convolution with a disc of this radius whose edge is softened by a normal curve; borders are mirrored."""
    kernel = _disc(radius, softness)
    reach = len(kernel) // 2
    padded = np.pad(images, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    transform = np.fft.rfft2(kernel, padded.shape[-2:])
    # Image by image, because the rounding of a batched transform may depend on the number of images.
    products = [np.fft.irfft2(np.fft.rfft2(image) * transform, padded.shape[-2:]) for image in padded]
    return np.stack(products)[..., 2 * reach :, 2 * reach :]


@cache
def _disc(radius: float, softness: float) -> np.ndarray:
    """Kernel of `defocus_blur`: a disc of this radius, smoothed by 3 x 3 (radius above 8: 5 x 5) Gaussian weights; sum 1."""
    edge = 1 if radius <= 8 else 2
    reach = int(radius) + edge
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (rows**2 + columns**2 <= radius**2).astype(float)
    curve = np.exp(-(np.arange(-edge, edge + 1) ** 2) / (2 * softness**2))
    soft = convolve(disc, np.outer(curve, curve), mode="constant")
    return (soft / soft.sum()).astype(np.float32)


def glass_blur(images: np.ndarray, generators: Generators, sigma: float, reach: float, rounds: float) -> np.ndarray:
    """Frosted glass: Gaussian blur, replacement of each pixel by one at most `reach` away, and the same blur again.

    Deviation: the paper describes shuffling; the published script copies pixels one after another, and so does this function.
    """
    count, _, height, width = images.shape
    blurred = gaussian_filter(images, sigma, mode="nearest", axes=(-2, -1)).reshape(count, -1, height * width)
    for _ in range(int(rounds)):
        sources = _sources(np.floor(uniform(generators, (2, height, width), -reach, reach)).astype(int), int(reach))
        blurred = np.take_along_axis(blurred, sources[:, None], 2)
    return gaussian_filter(blurred.reshape(images.shape), sigma, mode="nearest", axes=(-2, -1))


def _sources(offsets: np.ndarray, reach: int) -> np.ndarray:
    """Index of the original pixel that each pixel finally shows: (N, H * W), row by row.

    From the last pixel to the first, each copies the current value at its offset (N, 2, H, W), which may be a copy itself. A border
    stays unchanged, one pixel wider at the top and left, as in the published script.
    """
    height, width = offsets.shape[-2:]
    rows, columns = np.indices((height, width))
    inside = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    offsets = np.where(inside, offsets, 0)
    sources = ((rows + offsets[:, 0]) * width + columns + offsets[:, 1]).reshape(len(offsets), -1)
    copied = (sources > np.arange(height * width)) & np.take(inside.ravel(), sources)  # the source was overwritten before
    while copied.any():  # each round doubles the length of the chains that are resolved
        further = np.take_along_axis(sources, sources, 1)
        sources, copied = np.where(copied, further, sources), copied & np.take_along_axis(copied, sources, 1)
    return sources


def motion_blur(images: np.ndarray, generators: Generators, radius: float, sigma: float) -> np.ndarray:
    """Motion blur in a direction drawn uniformly from +-45 degrees around the right; see `smear`."""
    angles = uniform(generators, (1,), -45, 45)[:, 0]
    return smear(images, angles, radius=radius, sigma=sigma)


def zoom_blur(images: np.ndarray, generators: Generators, furthest: float, step: float) -> np.ndarray:
    """Zoom blur, as when moving towards the scene: mean of the image and its enlargements by 1, 1 + step, ..., 1 + furthest."""
    factors = 1 + step * np.arange(round(furthest / step) + 1)
    return (images + sum(zoom(images, factor) for factor in factors)) / np.float32(len(factors) + 1)


# Weather and light. Images are float32 (N, C, H, W) in [0, 1]; results may leave [0, 1].

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601

# Statistics of the five photographs of iced windows in the published sets: mean red, green and blue, and standard deviation, in grey levels
# of 255. Two of the photographs are the same picture.
PANES = np.array([[77, 148, 165, 11], [198, 203, 212, 13], [198, 203, 212, 13], [142, 157, 170, 15], [103, 114, 126, 24]], dtype=np.float32)
PANE_DEVIATION = 11 / 255  # standard deviation of the local mean over a pane


def snow(
    images: np.ndarray,
    generators: Generators,
    mean: float,
    deviation: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> np.ndarray:
    """Snow: kept * x + (1 - kept) * max(x, 1.5 grey + 0.5) + s + (s rotated by 180 degrees), a paler image with streaks of flakes.

    s is Gaussian noise enlarged by `size`, set to zero below `threshold`, and smeared downwards.
    """
    flakes = np.clip(zoom(mean + deviation * normal(generators, images.shape[-2:]), size), 0, 1)
    flakes[flakes < threshold] = 0
    angles = uniform(generators, (1,), -135, -45)[:, 0]
    layers = smear(flakes, angles, radius=radius, sigma=sigma)
    layers = (layers + layers[:, ::-1, ::-1])[:, None]
    return kept * images + (1 - kept) * np.maximum(images, 1.5 * _grey(images) + 0.5) + layers


def frost(images: np.ndarray, generators: Generators, kept: float, ice: float) -> np.ndarray:
    """Frost: kept * x + ice * pane, with one of five panes.

    Deviation: the published sets add photographs of iced windows, which cannot be redistributed. Here a pane is synthetic: needles in
    all directions on clouds, with the means and deviations of those photographs (PANES).
    """
    channels, height, width = images.shape[1:]
    draws = uniform(generators, (9,))
    tones = PANES[(draws[:, 0] * len(PANES)).astype(int)] / 255
    clouds = plasma(generators, height=height, width=width, decay=1.5)
    layers = normal(generators, (8, height, width))
    texture = _standard(clouds) + _standard(_needles(layers, 180 * draws[:, 1:]))
    colour = tones[:, :3] if channels == 3 else (tones[:, :3] @ LUMA)[:, None]
    shift = PANE_DEVIATION * normal(generators, (1, 1, 1))
    pane = colour[:, :, None, None] + shift + tones[:, 3, None, None, None] * _standard(texture)[:, None]
    return kept * images + ice * np.clip(pane, 0, 1)


def _needles(layers: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Maximum (N, H, W) over layers of noise (N, K, H, W), each smeared along its own angle (N, K)."""
    length = max(2.0, layers.shape[-1] / 16)
    drawn = smear(layers.reshape(-1, *layers.shape[-2:]), angles.ravel(), radius=2 * length, sigma=length)
    return drawn.reshape(layers.shape).max(1)


def _standard(fields: np.ndarray) -> np.ndarray:
    """Standardise each field (N, H, W) to mean 0 and standard deviation 1."""
    fields = fields - fields.mean((1, 2), keepdims=True)
    return fields / np.maximum(fields.std((1, 2), keepdims=True), 1e-6)


def fog(images: np.ndarray, generators: Generators, thickness: float, decay: float) -> np.ndarray:
    """Fog: (x + thickness * p) * m / (m + thickness), with a cloudy field p in [0, 1] and the image's largest value m."""
    largest = images.max((1, 2, 3), keepdims=True)
    clouds = plasma(generators, height=images.shape[2], width=images.shape[3], decay=decay)[:, None]
    return (images + thickness * clouds) * largest / (largest + thickness)


def brightness(images: np.ndarray, generators: Generators, more: float) -> np.ndarray:
    """Brightness: min(V + more, 1) in HSV with hue and saturation unchanged, so all channels of a pixel scale by the same factor."""
    value = images.max(1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, images * (brighter / np.where(value > 0, value, 1)), brighter).astype(np.float32)  # black pixels become grey


def _grey(images: np.ndarray) -> np.ndarray:
    """Luma (N, 1, H, W) of images (N, C, H, W)."""
    return np.einsum("nchw,c->nhw", images, LUMA)[:, None] if images.shape[1] == 3 else images


# Digital corruptions. Images are float32 (N, C, H, W) in [0, 1].


def contrast(images: np.ndarray, generators: Generators, factor: float) -> np.ndarray:
    """Contrast: (x - mean) * factor + mean, with the mean per channel and image."""
    means = images.mean((2, 3), keepdims=True)
    return (images - means) * np.float32(factor) + means


def elastic_transform(images: np.ndarray, generators: Generators, strength: float, smoothness: float, tilt: float) -> np.ndarray:
    """Elastic transform: a random affine map, then a smooth random displacement (Simard et al. 2003); lengths are shares of the short side.

    The affine map moves three points by at most `tilt` along each axis. The displacement is uniform noise in +-1, smoothed by a
    Gaussian of width `smoothness`, times `strength`.
    """
    size = np.array(images.shape[-2:])
    side = size.min()
    rows, columns = np.indices(tuple(size), dtype=np.float32)
    inverse = _inverse_affine(generators, size, tilt * side)
    grid = np.stack([rows, columns, np.ones_like(rows)], -1)
    images = bilinear(images, *np.moveaxis(np.einsum("hwk,nkd->nhwd", grid, inverse), -1, 0))
    if not strength:
        return images
    noise = uniform(generators, (2, *size), -1, 1)
    moves = gaussian_filter(noise, smoothness * side, mode="reflect", truncate=3, axes=(-2, -1)) * np.float32(strength * side)
    return bilinear(images, rows + moves[:, 0], columns + moves[:, 1])


def _inverse_affine(generators: Generators, size: np.ndarray, tilt: float) -> np.ndarray:
    """Matrices (N, 3, 2) that map (row, column, 1) of a pixel of the result to its position in the image."""
    arm = size.min() // 3
    corners = size // 2 + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + uniform(generators, (3, 2), -tilt, tilt)
    targets = np.concatenate([moved, np.ones((len(moved), 3, 1))], -1)
    return np.linalg.solve(targets, np.broadcast_to(corners.astype(float), (len(moved), 3, 2)))


def pixelate(images: np.ndarray, generators: Generators, share: float) -> np.ndarray:
    """Pixelation: shrink to a share of the size by averaging, and enlarge without interpolation."""
    height, width = images.shape[-2:]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    return _with_pillow(images, lambda image: image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX))


def jpeg_compression(images: np.ndarray, generators: Generators, quality: float) -> np.ndarray:
    """JPEG compression: encode with this quality, and decode."""

    def through_jpeg(image: Image.Image) -> Image.Image:
        file = BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _with_pillow(images, through_jpeg)


def _with_pillow(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply a function of Pillow to each image: as RGB if it has three channels, else channel by channel."""
    levels = np.rint(images * 255).astype(np.uint8)
    planes = np.moveaxis(levels, 1, -1) if images.shape[1] == 3 else levels.reshape(-1, *images.shape[-2:])
    changed = np.stack([np.asarray(change(Image.fromarray(plane))) for plane in np.ascontiguousarray(planes)])
    result = np.moveaxis(changed, -1, 1) if images.shape[1] == 3 else changed.reshape(images.shape)
    return result.astype(np.float32) / 255


# The table of corruptions, and their application

VALUES_AT_ONCE = 2**21  # floats processed at a time, to save memory and fit into caches


@dataclass(frozen=True)
class Corruption:
    """A corruption: `function(images, generators, *constants)` on float32 (N, C, H, W) in [0, 1]; `kind` is its group in the paper."""

    kind: Literal["noise", "blur", "weather", "digital"]
    function: Callable[..., np.ndarray]


# In the paper's order. To add one, add a row here, to both tables of `severities`, and to `config.CorruptionName`.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption("noise", gaussian_noise),
    "shot_noise": Corruption("noise", shot_noise),
    "impulse_noise": Corruption("noise", impulse_noise),
    "defocus_blur": Corruption("blur", defocus_blur),
    "glass_blur": Corruption("blur", glass_blur),
    "motion_blur": Corruption("blur", motion_blur),
    "zoom_blur": Corruption("blur", zoom_blur),
    "snow": Corruption("weather", snow),
    "frost": Corruption("weather", frost),
    "fog": Corruption("weather", fog),
    "brightness": Corruption("weather", brightness),
    "contrast": Corruption("digital", contrast),
    "elastic_transform": Corruption("digital", elastic_transform),
    "pixelate": Corruption("digital", pixelate),
    "jpeg_compression": Corruption("digital", jpeg_compression),
}


def corrupt(name: str, images: Tensor, *, severity: int, seed: int, first: int = 0) -> Tensor:
    """Corrupted copies of images.

    Grey images stay grey: noise is drawn for one channel, which also replaces all colours in the paper's formulas. Images with sides up
    to 64 pixels use the constants of CIFAR-C, larger ones those of ImageNet-C.

    Args:
        name: a key of CORRUPTIONS.
        images: uint8 (N, C, H, W), C = 1 or 3, sides of at least 4.
        severity: 1 to 5.
        seed: of the random numbers.
        first: index of the first image in its split; image i depends only on its pixels and (seed, name, severity, first + i).
    Returns:
        uint8 (N, C, H, W). Deviation: values are rounded to the nearest level; the published scripts round down.
    Raises:
        ValueError: name or severity are unknown.
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
