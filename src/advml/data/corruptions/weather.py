"""Weather and light. Images are float32 (N, C, H, W) in [0, 1]; results may leave [0, 1]."""

from __future__ import annotations

import numpy as np

from advml.data.corruptions.fields import Generators, normal, plasma, smear, uniform, zoom

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
