"""Colour changes with a strength per image, in torchvision's definitions.

Brightness, contrast, saturation and grey come from kornia, which takes a factor per image and defines these four
functions as torchvision does. (Its `adjust_brightness`, `adjust_contrast` and `adjust_saturation` are other things.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from torch import Tensor

from advml.config import View


def recolour(images: Tensor, spec: View, *, factors: Tensor, jitter: Tensor, grey: Tensor) -> Tensor:
    """Jitter the images drawn for it, then turn some grey.

    Args:
        images: float (N, C, H, W) in [0, 1]; without three channels, saturation, hue and grey leave them alone.
        spec: a part with strength zero is skipped.
        factors: (4, N) brightness, contrast and saturation factors, and hue in turns.
        jitter, grey: (N,) bool, on the CPU.
    """
    if spec.brightness or spec.contrast or spec.saturation or spec.hue:
        some_factors = factors[:, jitter].to(images)
        images = _replace(images, jitter, lambda some: _jitter(some, spec, some_factors))
    if spec.grey and images.shape[1] == 3:
        images = _replace(images, grey, lambda some: rgb_to_grayscale(some).expand_as(some))
    return images


def _replace(images: Tensor, mask: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the images under the mask only: the others stay bitwise the same and cost nothing."""
    if mask.all():
        return change(images)
    index = mask.nonzero().squeeze(1).to(images.device)
    return images.index_copy(0, index, change(images[index])) if len(index) else images


def _jitter(images: Tensor, spec: View, factors: Tensor) -> Tensor:
    # Deviation: torchvision draws the order of the four for every image; a batch needs one, so it is fixed.
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
    `min + chroma * clamp(|(h + offset) mod 6 - 3| - 1, 0, 1)`, offset 0, 4, 2 for R, G, B. Without a table of sextants
    this takes a third of the time of kornia's adjust_hue, which is why it is written here.
    """
    red, green, blue = images.unbind(1)
    low, top = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    chroma = top - low
    divisor = chroma.clamp(min=torch.finfo(images.dtype).tiny)  # grey pixels: 0 / tiny
    hue = torch.where(green == top, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(red == top, (green - blue) / divisor, hue) + 6 * turns[:, None, None]
    result = hue[:, None] + torch.tensor([0, 4, 2])[:, None, None].to(images)
    result = result.remainder_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return result.mul_(chroma[:, None]).add_(low[:, None])
