"""Batched augmentation: one random view of every image, computed on the images' device.

    >>> generator = torch.Generator().manual_seed(0)
    >>> view(images, config.views.contrastive, generator=generator)  # (N, C, H, W) in [0, 1]

The whole geometry is one resampling, so an image is interpolated once however many parts are on; colour follows, as
in SimCLR. `draw` takes all random numbers from a CPU generator, so a seed gives the same views on every device; how
many it takes depends on the spec and the number of images only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from advml.config import View
from advml.data.colour import recolour

CROP_CANDIDATES = 10  # as torchvision's RandomResizedCrop
LOG_ASPECT = math.log(4 / 3)


@dataclass(frozen=True)
class Draws:
    """The random parameters of N views, on the CPU. Pairs are (x, y); coordinates run from -1 to 1 over the image."""

    rotation: Tensor  # (N,) degrees, clockwise to the eye
    scale: Tensor  # (N,) zoom
    shift: Tensor  # (2, N) shares of the sides
    offset: Tensor  # (2, N) whole pixels, from pad and crop
    crop_centre: Tensor  # (2, N) coordinates
    crop_size: Tensor  # (2, N) shares of the sides
    flip: Tensor  # (N,) bool
    factors: Tensor  # (4, N) brightness, contrast, saturation factors; hue in turns
    jitter: Tensor  # (N,) bool: do the factors apply
    grey: Tensor  # (N,) bool


@torch.no_grad()
def view(images: Tensor, spec: View, *, generator: torch.Generator) -> Tensor:
    """One random view per image: crop, rotate and zoom, shift, flip; brightness, contrast, saturation, hue; grey.

    Each part does what torchvision's transform of that name does, but for the Deviations noted here and in `colour`.
    Saturation, hue and grey leave images without three channels as they are. No gradient flows through a view.

    Args:
        images: float (N, C, H, W) in [0, 1]; left as they are.
        spec: which parts are on, and how strong.
        generator: on the CPU, wherever the images are.
    Returns:
        New images (N, C, H, W) in [0, 1] with the dtype and device of `images`.
    Raises:
        TypeError: if `images` are not floating point.
    """
    if not images.is_floating_point():
        raise TypeError(f"view needs float images in [0, 1], not {images.dtype}; divide them by 255 first")
    draws = draw(spec, images.shape, generator=generator)
    result = images.to(torch.promote_types(images.dtype, torch.float32))  # bf16 is too coarse for positions and hue
    result = resample(result, spec, draws)
    result = recolour(result, spec, factors=draws.factors, jitter=draws.jitter, grey=draws.grey)
    return result.clamp(0, 1).to(images.dtype)


def draw(spec: View, shape: torch.Size, *, generator: torch.Generator) -> Draws:
    """The parameters of one view for each of `shape` = (N, C, H, W) images, uniform in the spec's ranges."""
    count, _, height, width = shape
    ranges = (
        (-spec.rotation, spec.rotation),
        spec.scale,
        *2 * [(-spec.shift, spec.shift)],
        *2 * [(0, 2 * spec.pad + 1)],
        *2 * [(0, 1)],  # place of the resized crop
        *[(max(0, 1 - strength), 1 + strength) for strength in (spec.brightness, spec.contrast, spec.saturation)],
        (-spec.hue, spec.hue),
        *3 * [(0, 1)],  # flip, jitter, grey: below their probability means yes
    )
    low, high = torch.tensor(ranges, dtype=torch.float32).T[..., None]
    values = torch.lerp(low, high, torch.rand(len(ranges), count, generator=generator))
    crop_size = torch.ones(2, count)
    if spec.resized_crop:
        crop_size = _crop_size(spec.resized_crop, width / height, torch.rand(2, CROP_CANDIDATES, count, generator=generator))
    return Draws(
        rotation=values[0],
        scale=values[1],
        shift=values[2:4],
        offset=values[4:6].floor().clamp(max=2 * spec.pad) - spec.pad,  # rounding may reach the open end: clamp
        crop_centre=(2 * values[6:8] - 1) * (1 - crop_size),
        crop_size=crop_size,
        factors=values[8:12],
        flip=values[12] < spec.flip,
        jitter=values[13] < spec.jitter,
        grey=values[14] < spec.grey,
    )


def _crop_size(area: tuple[float, float], aspect: float, uniform: Tensor) -> Tensor:
    """Sides (2, N), as shares, of the first of ten boxes that fits into the image; the whole image if none does.

    Deviation: torchvision rounds boxes to whole pixels and centres its last resort. Here a crop may begin between
    pixels, and the rim is interpolated with the neighbour outside the box where torchvision repeats the rim.
    """
    areas = area[0] + (area[1] - area[0]) * uniform[0]
    ratios = torch.exp((2 * uniform[1] - 1) * LOG_ASPECT)  # width / height, in pixels
    sizes = torch.stack([areas * ratios / aspect, areas / ratios * aspect]).sqrt()  # (2, candidates, N)
    fits = (sizes <= 1).all(0)
    first = fits.int().argmax(0)
    return torch.where(fits.any(0), sizes.gather(1, first.expand(2, 1, -1)).squeeze(1), 1.0)


def resample(images: Tensor, spec: View, draws: Draws) -> Tensor:
    """Crop, rotate and zoom about the centre, shift, flip: composed and looked up backwards, once.

    The view at p = (x, y) shows the image at `crop_centre + 2 offset / side + crop_size * R(F p - 2 shift) / scale`,
    where F mirrors x and R rotates back. What lies outside the image is black.
    """
    moves = spec.rotation or spec.shift or spec.scale != (1, 1)
    if not (moves or spec.resized_crop or spec.pad or spec.flip):
        return images
    height, width = images.shape[-2:]
    angle = torch.deg2rad(draws.rotation)
    cosine, sine = angle.cos() / draws.scale, angle.sin() / draws.scale
    along_x = draws.crop_size * torch.stack([cosine, -sine * (width / height)])  # (2, N): where a step along x leads
    along_y = draws.crop_size * torch.stack([sine * (height / width), cosine])
    start = draws.crop_centre + 2 * draws.offset / torch.tensor([[width], [height]])
    start = start - 2 * draws.shift[0] * along_x - 2 * draws.shift[1] * along_y
    along_x = torch.where(draws.flip, -along_x, along_x)

    along_x, along_y, start = torch.stack([along_x, along_y, start]).mT[:, :, None, None].to(images)  # (N, 1, 1, 2) each
    x, y = ((2 * torch.arange(side).to(images) + 1) / side - 1 for side in (width, height))  # centres of the pixels
    # affine_grid would multiply matrices here: slower, and inexact under autocast or TF32.
    grid = (start + y[:, None, None] * along_y) + x[:, None] * along_x  # (N, H, W, 2)
    # Pad, crop and flip alone land on the centres of pixels, where "nearest" copies the very values.
    mode = "bilinear" if moves or spec.resized_crop else "nearest"
    # A resized crop alone never leaves the image; black would only creep half a pixel into its rim.
    padding = "border" if spec.resized_crop and not (moves or spec.pad) else "zeros"
    return grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)
