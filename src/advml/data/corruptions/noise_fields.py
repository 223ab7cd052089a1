"""Random numbers per image, and operations on pixel grids, shared by several corruptions.

All functions work on float32 arrays whose last two axes are rows and columns. Every image is processed by itself, so its result does not
depend on the rest of the batch, not even in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

ROUNDED_FROM = 32  # pixels, the smallest side in the published sets: from here on, `zoom` rounds as the published scripts do
Generators = Sequence[torch.Generator]  # one per image


def uniform(generators: Generators, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Uniform random numbers (N, *shape) in [low, high); image i draws from generator i."""
    drawn = np.stack([torch.rand(shape, generator=generator).numpy() for generator in generators])
    return low + (high - low) * drawn


def normal(generators: Generators, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal random numbers (N, *shape); image i draws from generator i."""
    return np.stack([torch.randn(shape, generator=generator).numpy() for generator in generators])


def zoom(fields: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge fields (..., H, W) about the centre by a factor >= 1, bilinearly, and crop them to their size."""
    for axis in (-2, -1):
        size = fields.shape[axis]
        at = _zoomed(size, factor)
        low = np.clip(np.floor(at).astype(int), 0, size - 2)
        share = (at - low).astype(np.float32).reshape((-1, 1) if axis == -2 else (-1,))
        fields = fields.take(low, axis) * (1 - share) + fields.take(low + 1, axis) * share
    return fields


def _zoomed(size: int, factor: float) -> np.ndarray:
    """Positions in the original line of the `size` points of an enlarged one.

    Crop and enlargement are rounded to whole pixels as in the published scripts, which shifts the line by up to half a pixel: on
    32 pixels that is most of the effect of a small factor. Deviation: on fewer pixels nothing is rounded, because many factors would
    have no effect at all.
    """
    if size < ROUNDED_FROM:
        return (np.arange(size) - (size - 1) / 2) / factor + (size - 1) / 2
    crop = int(np.ceil(size / factor))
    enlarged = round(crop * factor)
    return (size - crop) // 2 + ((enlarged - size) // 2 + np.arange(size)) * (crop - 1) / (enlarged - 1)


def bilinear(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Interpolate images (N, C, H, W) bilinearly at points (N, H, W); mirrored beyond the border."""
    size = np.array(images.shape[-2:])
    low, share = zip(*(_split(np.clip(at, -4 * n, 5 * n)) for at, n in zip((rows, columns), size, strict=True)), strict=True)
    number = np.arange(len(images))[:, None, None]
    result = np.zeros_like(images)
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - share[0]) * np.abs(1 - right - share[1])
            row, column = _mirror(low[0] + down, size[0]), _mirror(low[1] + right, size[1])
            result += weight[:, None] * np.moveaxis(images[number, :, row, column], -1, 1)
    return result


def _split(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer part and fraction."""
    low = np.floor(at)
    return low.astype(int), (at - low).astype(np.float32)


def _mirror(index: np.ndarray, size: int) -> np.ndarray:
    """Mirror indices into [0, n - 1]: ... 2 1 0 1 2 ... n-2 n-1 n-2 ..."""
    index = np.abs(index) % (2 * size - 2)
    return np.minimum(index, 2 * size - 2 - index)


def smear(fields: np.ndarray, angles: np.ndarray, *, radius: float, sigma: float) -> np.ndarray:
    """Motion blur of each field of (N, ..., H, W): sum over i = 0 .. 2 radius of w_i field(p + i u), w_i ~ exp(-i^2 / 2 sigma^2).

    u points down from the right by `angles` (N,), in degrees; points are rounded to pixels, and the border is repeated outwards. This is
    ImageMagick's definition, used for the published sets: a half-Gaussian, so that an edge has a trail on one side only.
    """
    weights = _half_normal(radius, sigma)
    steps, turns = np.arange(len(weights)), np.radians(angles)[:, None]
    down, right = (np.ceil(steps * part - 0.5).astype(int) for part in (np.sin(turns), np.cos(turns)))  # (N, steps)
    reach, sides = len(weights), fields.shape[-2:]
    flat = fields.reshape(len(fields), -1, *sides)
    padded = np.pad(flat, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="edge")
    shifted = sliding_window_view(padded, sides, axis=(-2, -1))
    result, every = np.zeros_like(flat), np.arange(len(flat))
    for weight, y, x in zip(weights, reach + down.T, reach + right.T, strict=True):
        result += weight * shifted[every, :, y, x]
    return result.reshape(fields.shape)


@cache
def _half_normal(radius: float, sigma: float) -> np.ndarray:
    """Weights of a half-Gaussian with sum 1, without those that change no pixel by a hundredth of a grey level."""
    weights = np.exp(-(np.arange(2 * int(np.ceil(radius)) + 1) ** 2) / (2 * sigma**2))
    weights = weights[weights > weights.sum() / 25_500]
    return (weights / weights.sum()).astype(np.float32)


def plasma(generators: Generators, *, height: int, width: int, decay: float) -> np.ndarray:
    """Cloudy fields (N, height, width) that span [0, 1], by midpoint displacement on a torus (Fournier, Fussell & Carpenter 1982).

    Each point is the mean of its four neighbours on the grid one level coarser, plus uniform noise in +-a; a is divided by `decay`
    squared per level, so a small decay gives a rough field.
    """
    side = 1 << (max(height, width, 2) - 1).bit_length()
    noise = uniform(generators, (side, side), -1, 1)
    field, step, amplitude = np.zeros_like(noise), side, 1.0
    while step > 1:
        half = step // 2
        corners = field[:, ::step, ::step]
        below = corners + np.roll(corners, -1, 1)
        field[:, half::step, half::step] = (below + np.roll(below, -1, 2)) / 4 + amplitude * noise[:, half::step, half::step]
        centres = field[:, half::step, half::step]
        top = corners + np.roll(corners, -1, 2) + centres + np.roll(centres, 1, 1)
        left = below + centres + np.roll(centres, 1, 2)
        field[:, ::step, half::step] = top / 4 + amplitude * noise[:, ::step, half::step]
        field[:, half::step, ::step] = left / 4 + amplitude * noise[:, half::step, ::step]
        step, amplitude = half, amplitude / decay**2
    field -= field.min((1, 2), keepdims=True)
    return (field / field.max((1, 2), keepdims=True))[:, :height, :width]
