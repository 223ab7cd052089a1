"""Digital corruptions. Images are float32 (N, C, H, W) in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from advml.data.corruptions.fields import Generators, bilinear, uniform


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
