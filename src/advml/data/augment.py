"""Batched augmentation: one random view of every image, computed on the images' device.

    >>> generator = torch.Generator().manual_seed(0)
    >>> view(images, config.views.contrastive, generator=generator)  # (N, C, H, W) in [0, 1]

All geometric transforms are one resampling, so that an image is interpolated only once; colour follows, as in SimCLR. `draw` draws all
random numbers on the generator's device: a CPU generator gives the same views on every device, a generator on the images' device avoids
waiting for transfers. The number of draws depends only on the spec and the number of images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from torch import Tensor
from torch.nn.functional import grid_sample

from advml.config import View
from advml.core import ranks

# Colour changes with a strength per image, by torchvision's definitions.
#
# Brightness, contrast, saturation and grey use those functions of kornia that take a factor per image and agree with torchvision.
# (kornia's `adjust_brightness`, `adjust_contrast` and `adjust_saturation` have other definitions.)


def recolour(images: Tensor, spec: View, *, factors: Tensor, jitter: Tensor, grey: Tensor) -> Tensor:
    """Jitter the colours of the images under the mask `jitter`, then convert those under `grey` to grey.

    Args:
        images: float (N, C, H, W) in [0, 1]; saturation, hue and grey apply only to images of three channels.
        spec: changes of strength zero are skipped.
        factors: (4, N) brightness, contrast and saturation factors, and hue in turns.
        jitter, grey: (N,) bool.
    """
    if spec.brightness or spec.contrast or spec.saturation or spec.hue:
        images = _replace(images, jitter, _jitter(images, spec, factors), share=spec.jitter)
    if spec.grey and images.shape[1] == 3:
        images = _replace(images, grey, rgb_to_grayscale(images).expand_as(images), share=spec.grey)
    return images


def _replace(images: Tensor, mask: Tensor, changed: Tensor, *, share: float) -> Tensor:
    """Select changed images under the mask (N,), and original ones elsewhere, bit for bit.

    All images are changed before the selection: to change only some, the host would have to wait for the mask. `share` is the mean of
    the mask; 1 skips the selection.
    """
    return changed if share == 1 else torch.where(mask[:, None, None, None], changed, images)


def _jitter(images: Tensor, spec: View, factors: Tensor) -> Tensor:
    # Deviation: torchvision draws the order of the four changes per image; here it is fixed, because a batch needs one order.
    brightness, contrast, saturation, hue = factors
    if spec.brightness:
        images = adjust_brightness_accumulative(images, brightness)
    if spec.contrast:
        images = adjust_contrast_with_mean_subtraction(images, contrast)
    if spec.saturation and images.shape[1] == 3:
        images = adjust_saturation_with_gray_subtraction(images, saturation)
    if spec.hue and images.shape[1] == 3:
        images = turn_hue(images, hue)
    return images


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB images (N, 3, H, W) by `turns` (N,), keeping HSV saturation and value.

    With h in sixths of a turn and chroma = max - min, a channel of HSV is
    `min + chroma * clamp(|(h + offset) mod 6 - 3| - 1, 0, 1)`, offset 0, 4, 2 for R, G, B. This needs no table of sextants, and a
    third of the time of kornia's adjust_hue.
    """
    red, green, blue = images.unbind(1)
    low, top = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    chroma = top - low
    divisor = chroma.clamp(min=torch.finfo(images.dtype).tiny)  # grey pixels: 0 / tiny
    hue = torch.where(green == top, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(red == top, (green - blue) / divisor, hue) + 6 * turns[:, None, None]
    offsets = torch.arange(3, device=images.device, dtype=images.dtype).mul_(4).remainder_(6)  # 0, 4, 2
    result = hue[:, None] + offsets[:, None, None]
    result = result.remainder_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return result.mul_(chroma[:, None]).add_(low[:, None])


# Random views

SHRINKING = ("rotation", "shift", "brightness", "contrast", "saturation", "hue", "jitter", "grey")  # parts that are off at 0
CROP_CANDIDATES = 10  # number of tries, as in torchvision's RandomResizedCrop
LOG_ASPECT = math.log(4 / 3)


@dataclass(frozen=True)
class Draws:
    """Random parameters of N views. Pairs are (x, y); coordinates run from -1 to 1 over the image."""

    rotation: Tensor  # (N,) degrees, clockwise as seen
    scale: Tensor  # (N,) zoom
    shift: Tensor  # (2, N) shares of the sides
    offset: Tensor  # (2, N) whole pixels, from pad and crop
    crop_centre: Tensor  # (2, N) coordinates
    crop_size: Tensor  # (2, N) shares of the sides
    flip: Tensor  # (N,) bool
    factors: Tensor  # (4, N) brightness, contrast, saturation factors; hue in turns
    jitter: Tensor  # (N,) bool: whether the factors apply
    grey: Tensor  # (N,) bool

    def own(self, device: torch.device) -> Draws:
        """Parameters of this process's images, on a device."""
        return Draws(**{name: ranks.own(values, dim=-1).to(device) for name, values in vars(self).items()})


@torch.no_grad()
def view(images: Tensor, spec: View, *, generator: torch.Generator) -> Tensor:
    """Draw one random view per image: crop, rotate and zoom, shift, flip; brightness, contrast, saturation, hue; grey.

    Each change equals torchvision's transform of that name, except for the comments marked "Deviation" in this file.
    Saturation, hue and grey apply only to images of three channels. Views have no gradient.

    Args:
        images: float (N, C, H, W) in [0, 1]; not modified.
        spec: the transforms and their strengths.
        generator: on the CPU or on the images' device.
    Returns:
        New images (N, C, H, W) in [0, 1] with the dtype and device of `images`.
    Raises:
        TypeError: `images` are not floating point.
    """
    if not images.is_floating_point():
        raise TypeError(f"view needs float images in [0, 1], not {images.dtype}; divide them by 255 first")
    draws = draw(spec, torch.Size([ranks.batch_size(len(images)), *images.shape[1:]]), generator=generator).own(images.device)
    result = images.to(torch.promote_types(images.dtype, torch.float32))  # bf16 is too coarse for positions and hue
    result = resample(result, spec, draws)
    result = recolour(result, spec, factors=draws.factors, jitter=draws.jitter, grey=draws.grey)
    return result.clamp(0, 1).to(images.dtype)


def weakened(spec: View, strength: float) -> View:
    """Scale the strength of views by s in [0, 1]: ranges and probabilities of colour changes shrink, and s = 0 gives the image itself.

    [low, high] of a crop's area becomes [1 - s (1 - low), 1 - s (1 - high)] (DynACL, Luo et al. 2023, sec. 4.1); flips do not change.
    """
    if strength == 1:
        return spec
    shrunk = {name: strength * getattr(spec, name) for name in SHRINKING}
    shrunk |= {"pad": round(strength * spec.pad), "scale": tuple(1 + strength * (end - 1) for end in spec.scale)}
    if spec.resized_crop:
        shrunk["resized_crop"] = tuple(1 - strength * (1 - end) for end in spec.resized_crop)
    return spec.model_copy(update=shrunk)


def draw(spec: View, shape: torch.Size, *, generator: torch.Generator) -> Draws:
    """Draw the parameters of one view per image of `shape` = (N, C, H, W), uniform in the spec's ranges."""
    count, _, height, width = shape
    low, high = _ranges(spec, device := generator.device)
    values = torch.lerp(low, high, torch.rand(len(low), count, generator=generator, device=device))
    crop_size = torch.ones(2, count, device=device)
    if spec.resized_crop:
        uniform = torch.rand(2, CROP_CANDIDATES, count, generator=generator, device=device)
        crop_size = _crop_size(spec.resized_crop, width / height, uniform)
    return Draws(
        rotation=values[0],
        scale=values[1],
        shift=values[2:4],
        offset=values[4:6].floor().clamp(max=2 * spec.pad) - spec.pad,  # clamp, because rounding may reach the open end
        crop_centre=(2 * values[6:8] - 1) * (1 - crop_size),
        crop_size=crop_size,
        factors=values[8:12],
        flip=values[12] < spec.flip,
        jitter=values[13] < spec.jitter,
        grey=values[14] < spec.grey,
    )


@cache  # because a copy to a device makes the host wait
def _ranges(spec: View, device: torch.device) -> tuple[Tensor, Tensor]:
    """Low and high ends (15, 1) of the uniform distributions of a view's parameters."""
    ranges = (
        (-spec.rotation, spec.rotation),
        spec.scale,
        *2 * [(-spec.shift, spec.shift)],
        *2 * [(0, 2 * spec.pad + 1)],
        *2 * [(0, 1)],  # position of the resized crop
        *[(max(0, 1 - strength), 1 + strength) for strength in (spec.brightness, spec.contrast, spec.saturation)],
        (-spec.hue, spec.hue),
        *3 * [(0, 1)],  # flip, jitter, grey: applied if below their probability
    )
    low, high = torch.tensor(ranges, dtype=torch.float32, device=device).T[..., None]
    return low, high


def _crop_size(area: tuple[float, float], aspect: float, uniform: Tensor) -> Tensor:
    """Sides (2, N), as shares of the image's, of the first of ten random boxes that fits into the image; the whole image if none does.

    Deviation: torchvision rounds boxes to whole pixels, and crops the centre if no box fits. Here a crop may begin between pixels, and
    its border is interpolated with pixels outside of the box, where torchvision repeats the border.
    """
    areas = area[0] + (area[1] - area[0]) * uniform[0]
    ratios = torch.exp((2 * uniform[1] - 1) * LOG_ASPECT)  # width / height, in pixels
    sizes = torch.stack([areas * ratios / aspect, areas / ratios * aspect]).sqrt()  # (2, candidates, N)
    fits = (sizes <= 1).all(0)
    first = fits.int().argmax(0)
    return torch.where(fits.any(0), sizes.gather(1, first.expand(2, 1, -1)).squeeze(1), 1.0)


def resample(images: Tensor, spec: View, draws: Draws) -> Tensor:
    """Crop, rotate and zoom about the centre, shift and flip, by one resampling.

    The view at p = (x, y) takes the image at `crop_centre + 2 offset / side + crop_size * R(F p - 2 shift) / scale`,
    where F mirrors x and R rotates back. Points outside of the image are black.
    """
    moves = spec.rotation or spec.shift or spec.scale != (1, 1)
    if not (moves or spec.resized_crop or spec.pad or spec.flip):
        return images
    height, width = images.shape[-2:]
    angle = torch.deg2rad(draws.rotation)
    cosine, sine = angle.cos() / draws.scale, angle.sin() / draws.scale
    along_x = draws.crop_size * torch.stack([cosine, -sine * (width / height)])  # (2, N): step in the image per step along x
    along_y = draws.crop_size * torch.stack([sine * (height / width), cosine])
    start = draws.crop_centre + torch.stack([2 * offset / side for offset, side in zip(draws.offset, (width, height), strict=True)])
    start = start - 2 * draws.shift[0] * along_x - 2 * draws.shift[1] * along_y
    along_x = torch.where(draws.flip, -along_x, along_x)

    along_x, along_y, start = torch.stack([along_x, along_y, start]).mT[:, :, None, None].to(images)  # (N, 1, 1, 2) each
    sides = (torch.arange(side, device=images.device, dtype=images.dtype) for side in (width, height))
    x, y = ((2 * side + 1) / len(side) - 1 for side in sides)  # centres of the pixels
    # Not affine_grid, whose matrix products are slower, and inexact under autocast or TF32.
    grid = (start + y[:, None, None] * along_y) + x[:, None] * along_x  # (N, H, W, 2)
    # Pad, crop and flip alone map pixel centres to pixel centres, where "nearest" copies values exactly.
    mode = "bilinear" if moves or spec.resized_crop else "nearest"
    # A resized crop alone never leaves the image; zero padding would only darken its outermost half pixel.
    padding = "border" if spec.resized_crop and not (moves or spec.pad) else "zeros"
    return grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)
