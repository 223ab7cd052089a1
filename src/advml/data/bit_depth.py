"""Images with more than 8 bits per channel -> 8 bits, by one white level for a whole data set.

A 16-bit file rarely says how many of its bits are used: a 12-bit camera fills 0 to 4095, and divided by 65535 that is
nearly black. The range in use over all images tells: white is the smallest 2^k - 1 (k >= 8) that no value exceeds, or
`data.white_level`. It is the same for all images, so that brightness stays comparable between them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from advml.core.errors import UserError

FULL = 65535
GREY = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of one channel with more than 8 bits
DIM = 8  # half of the images below this fraction of white are too many to be meant
DARK = "are nearly black, and every epsilon is large beside their contrast"
PHOTOMETRIC = 262  # TIFF's tag; 0: the smallest value is white


@dataclass(frozen=True)
class Depth:
    """The images of a data set that have more than 8 bits per channel.

    Attributes:
        images: their number.
        largest: the largest value in any of them.
        median: of the largest values of each.
        white_level: the value that became white, 255.
    """

    images: int
    largest: float
    median: float
    white_level: float


@dataclass(frozen=True)
class Largest:
    """The largest value of one image; of `colour`, Pillow reads the upper 8 bits of each channel alone."""

    value: float
    colour: bool


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is open, but not loaded, has more than 8 bits per channel and does not say what is white.

    PPM files say it: Pillow stretches what they call their largest value to 65535.
    """
    if not image.tile:
        return image.mode in GREY
    codec, _, _, form = image.tile[0]
    if image.format == "PPM" and codec != "raw":
        return form[-1] == FULL
    return image.mode in GREY or (";16" in str(form) and "BGR;16" not in str(form))  # BMP's pixels of 5, 6 and 5 bits


def largest(image: Image.Image, *, white: float | None) -> Largest:
    """The largest value of a deep image.

    Raises:
        ValueError: values are below 0 or not finite, or of floating point without a `white` level.
    """
    if image.mode not in GREY:
        tops = [high for _, high in image.convert("RGB").getextrema()]
        return Largest(256 * max(tops) + 255, colour=True)
    if image.mode == "F" and white is None:
        raise ValueError("floating-point pixels of unknown range; say which value is white, e.g. -S data.white_level=1")
    values = np.asarray(image)
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and np.isfinite(high)):
        raise ValueError(f"values from {low:g} to {high:g}; save it with values from 0")
    return Largest(high, colour=False)


def settle(found: Collection[Largest], *, white: float | None) -> Depth:
    """The white level of a data set.

    Args:
        found: the largest value of each deep image.
        white: `data.white_level`.
    Raises:
        UserError: colour images of 16 bits would have to be stretched, although Pillow reads their upper 8 bits alone.
    """
    top = max(one.value for one in found)
    level = white or _holding(top)
    colour = sum(one.colour for one in found)
    if colour and level != FULL:
        why = "data.white_level" if white else f"no value exceeds {top:g}, so white"
        raise UserError(
            f"{why} = {level:g}, but of {colour} colour images with 16 bits per channel only the upper 8 bits can be read; "
            f"save them with 8 bits, or take them as they are with -S data.white_level={FULL}"
        )
    return Depth(len(found), top, float(np.median([one.value for one in found])), level)


def _holding(value: float) -> float:
    """The smallest 2^k - 1 (k >= 8) that is not below `value`, up to its fraction."""
    return float(2 ** max(8, int(value).bit_length()) - 1)


def eight_bits(image: Image.Image, *, white: float) -> Image.Image:
    """A loaded image of any mode with 8 bits per channel: round(255 * value / white), cut off at 255."""
    if image.mode not in GREY:
        return image
    values = np.rint(np.asarray(image) * (255 / white)).clip(0, 255).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # Pillow turns 8-bit pixels only
        values = 255 - values
    return Image.fromarray(values)


def warning(images: np.ndarray) -> list[str]:
    """A line if half of the images (uint8, N x C x H x W) are nearly black: 16 grey levels that were saved as 0 to 15, say."""
    median = float(np.median(images.max((1, 2, 3))))
    if not 0 < median < 255 / DIM:
        return []
    remedy = "save them with values up to 255, if they are not meant to be that dark"
    return [f"WARNING: half of the images hold no value above {median:g} of 255 and {DARK}; {remedy}"]


def sentence(depth: Mapping[str, Any], *, chosen: bool) -> str:
    """The `depth` of dataset.json in words, without capital and full stop; `chosen`: by data.white_level."""
    how = "by data.white_level" if chosen else "found from the range in use; another with -S data.white_level=VALUE"
    cut = "; larger values are cut off" if depth["largest"] > depth["white_level"] else ""
    median = depth.get("median", depth["white_level"])  # data that an older version prepared lack it
    if not chosen and median < depth["white_level"] / DIM:
        cut = (
            f"; WARNING: half of them hold no value above {median:.10g} and {DARK}: if few saturated or marked pixels exceed it, "
            f"set data.white_level={_holding(median) if median > 255 else median:.10g}"
        )
    return (
        f"{depth['images']} of the images have more than 8 bits per channel, with values up to {depth['largest']:.10g}: "
        f"{depth['white_level']:.10g} is white ({how}){cut}"
    )
