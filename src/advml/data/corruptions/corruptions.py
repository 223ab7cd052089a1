"""Corrupt test images on the fly.

    >>> corrupted = corrupt("fog", images, severity=3, seed=0)      # uint8 (N, C, H, W) -> the same

Every image draws its random numbers from a generator of its own, so it looks the same in any batch.
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


# Blur. Images are float32 (N, C, H, W) in [0, 1]; lengths are pixels.


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


# Weather and light. Images are float32 (N, C, H, W) in [0, 1]; results may leave [0, 1].

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601

# The iced panes of the published sets, as far as statistics tell of them: mean red, green and blue, standard deviation, in grey levels
# of 255. Two of the five photographs are the same picture.
PANES = np.array([[77, 148, 165, 11], [198, 203, 212, 13], [198, 203, 212, 13], [142, 157, 170, 15], [103, 114, 126, 24]], dtype=np.float32)
PANE_DEVIATION = 11 / 255  # of the mean, from place to place on a pane


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
    """Paler, and with flakes in streaks: kept * x + (1 - kept) * max(x, 1.5 grey + 0.5) + s + s turned by 180 degrees.

    s is normal noise enlarged by `size`, cut off below `threshold`, and smeared downwards.
    """
    flakes = np.clip(zoom(mean + deviation * normal(generators, images.shape[-2:]), size), 0, 1)
    flakes[flakes < threshold] = 0
    angles = uniform(generators, (1,), -135, -45)[:, 0]
    layers = smear(flakes, angles, radius=radius, sigma=sigma)
    layers = (layers + layers[:, ::-1, ::-1])[:, None]
    return kept * images + (1 - kept) * np.maximum(images, 1.5 * _grey(images) + 0.5) + layers


def frost(images: np.ndarray, generators: Generators, kept: float, ice: float) -> np.ndarray:
    """kept * x + ice * pane, the pane being one of five.

    Deviation: the published sets add photographs of iced windows, which are not ours to hand on. A pane here is drawn: needles in
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
    """The brightest of layers of noise (N, K, H, W), each drawn out along its own angle (N, K): (N, H, W)."""
    length = max(2.0, layers.shape[-1] / 16)
    drawn = smear(layers.reshape(-1, *layers.shape[-2:]), angles.ravel(), radius=2 * length, sigma=length)
    return drawn.reshape(layers.shape).max(1)


def _standard(fields: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 for each field (N, H, W)."""
    fields = fields - fields.mean((1, 2), keepdims=True)
    return fields / np.maximum(fields.std((1, 2), keepdims=True), 1e-6)


def fog(images: np.ndarray, generators: Generators, thickness: float, decay: float) -> np.ndarray:
    """(x + thickness * p) * m / (m + thickness), with p a cloudy field in [0, 1] and m the image's largest value."""
    largest = images.max((1, 2, 3), keepdims=True)
    clouds = plasma(generators, height=images.shape[2], width=images.shape[3], decay=decay)[:, None]
    return (images + thickness * clouds) * largest / (largest + thickness)


def brightness(images: np.ndarray, generators: Generators, more: float) -> np.ndarray:
    """V + more in HSV, at most 1, with hue and saturation as they are: the values of a pixel scale alike. V is the largest of them."""
    value = images.max(1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, images * (brighter / np.where(value > 0, value, 1)), brighter).astype(np.float32)  # black has no hue


def _grey(images: np.ndarray) -> np.ndarray:
    """(N, 1, H, W)."""
    return np.einsum("nchw,c->nhw", images, LUMA)[:, None] if images.shape[1] == 3 else images


# Digital corruptions. Images are float32 (N, C, H, W) in [0, 1].


def contrast(images: np.ndarray, generators: Generators, factor: float) -> np.ndarray:
    """(x - mean) * factor + mean, with the mean of each channel of each image."""
    means = images.mean((2, 3), keepdims=True)
    return (images - means) * np.float32(factor) + means


def elastic_transform(images: np.ndarray, generators: Generators, strength: float, smoothness: float, tilt: float) -> np.ndarray:
    """A random affine map, then a random smooth displacement (Simard et al. 2003); all lengths are shares of the shorter side.

    The affine map moves three points by at most `tilt` along each axis. The displacement is uniform noise in +-1, smoothed by a
    normal curve of `smoothness`, times `strength`.
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
    """(N, 3, 2): (row, column, 1) of a pixel of the result -> where it comes from."""
    arm = size.min() // 3
    corners = size // 2 + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + uniform(generators, (3, 2), -tilt, tilt)
    targets = np.concatenate([moved, np.ones((len(moved), 3, 1))], -1)
    return np.linalg.solve(targets, np.broadcast_to(corners.astype(float), (len(moved), 3, 2)))


def pixelate(images: np.ndarray, generators: Generators, share: float) -> np.ndarray:
    """Shrink to a share of the size, each new pixel the mean of those it covers, and enlarge again without interpolation."""
    height, width = images.shape[-2:]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    return _with_pillow(images, lambda image: image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX))


def jpeg_compression(images: np.ndarray, generators: Generators, quality: float) -> np.ndarray:
    """Written as JPEG of this quality, and read again."""

    def through_jpeg(image: Image.Image) -> Image.Image:
        file = BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _with_pillow(images, through_jpeg)


def _with_pillow(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Each image through a function of Pillow's: with three channels as RGB, else channel by channel."""
    levels = np.rint(images * 255).astype(np.uint8)
    planes = np.moveaxis(levels, 1, -1) if images.shape[1] == 3 else levels.reshape(-1, *images.shape[-2:])
    changed = np.stack([np.asarray(change(Image.fromarray(plane))) for plane in np.ascontiguousarray(planes)])
    result = np.moveaxis(changed, -1, 1) if images.shape[1] == 3 else changed.reshape(images.shape)
    return result.astype(np.float32) / 255


# Corrupt test images on the fly.

VALUES_AT_ONCE = 2**21  # floats; keeps memory low and the caches warm


@dataclass(frozen=True)
class Corruption:
    """`function(images, generators, *constants)` on float32 (N, C, H, W) in [0, 1]; `kind` groups them as in the paper."""

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
