"""Convert images with more than 8 bits per channel to 8 bits, by one white level for the whole dataset.

A 16-bit file rarely states how many bits are used: a 12-bit camera writes 0 to 4095, which divided by 65535 is nearly black. So white
is the smallest 2^k - 1 (k >= 8) that no value of any image exceeds, or `data.white_level`. It is the same for all images, so that
brightness stays comparable between them.
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
DIM = 8  # warn if the largest values of half of the images are below white / DIM
DARK = "are nearly black, so that epsilon is large compared with their contrast"
PHOTOMETRIC = 262  # TIFF tag; 0: the smallest value is white


@dataclass(frozen=True)
class Depth:
    """Statistics of a dataset's images with more than 8 bits per channel.

    Attributes:
        images: their number.
        largest: the largest value in any of them.
        median: median of the images' largest values.
        white_level: the value that is mapped to 255.
    """

    images: int
    largest: float
    median: float
    white_level: float


@dataclass(frozen=True)
class Largest:
    """Largest value of one image; for `colour` images, Pillow reads only the upper 8 bits of each channel."""

    value: float
    colour: bool


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded image has more than 8 bits per channel and does not state its white level.

    PPM files state it: Pillow scales their largest value to 65535.
    """
    if not image.tile:
        return image.mode in GREY
    codec, _, _, form = image.tile[0]
    if image.format == "PPM" and codec != "raw":
        return form[-1] == FULL
    return image.mode in GREY or (";16" in str(form) and "BGR;16" not in str(form))  # BGR;16: BMP pixels of 5, 6 and 5 bits


def largest(image: Image.Image, *, white: float | None) -> Largest:
    """Largest value of an image with more than 8 bits per channel.

    Raises:
        ValueError: values are negative or not finite, or floating point without a `white` level.
    """
    if image.mode not in GREY:
        tops = [high for _, high in image.convert("RGB").getextrema()]
        return Largest(256 * max(tops) + 255, colour=True)
    if image.mode == "F" and white is None:
        raise ValueError("floating-point pixels of unknown range; set the value of white, e.g. -S data.white_level=1")
    values = np.asarray(image)
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and np.isfinite(high)):
        raise ValueError(f"values from {low:g} to {high:g}; save it with values from 0")
    return Largest(high, colour=False)


def settle(found: Collection[Largest], *, white: float | None) -> Depth:
    """Choose the white level of a dataset.

    Args:
        found: the largest value of each image with more than 8 bits per channel.
        white: `data.white_level`.
    Raises:
        UserError: 16-bit colour images would have to be scaled, but Pillow reads only their upper 8 bits.
    """
    top = max(one.value for one in found)
    level = white or _holding(top)
    colour = sum(one.colour for one in found)
    if colour and level != FULL:
        why = "data.white_level" if white else f"no value exceeds {top:g}, so white"
        raise UserError(
            f"{why} = {level:g}, but of {colour} colour images with 16 bits per channel only the upper 8 bits can be read; "
            f"save them with 8 bits, or use them unscaled with -S data.white_level={FULL}"
        )
    return Depth(len(found), top, float(np.median([one.value for one in found])), level)


def _holding(value: float) -> float:
    """Smallest 2^k - 1 (k >= 8) that is at least the integer part of `value`."""
    return float(2 ** max(8, int(value).bit_length()) - 1)


def eight_bits(image: Image.Image, *, white: float) -> Image.Image:
    """Convert a loaded image of any mode to 8 bits per channel: round(255 * value / white), at most 255."""
    if image.mode not in GREY:
        return image
    values = np.rint(np.asarray(image) * (255 / white)).clip(0, 255).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # Pillow inverts only 8-bit pixels
        values = 255 - values
    return Image.fromarray(values)


def warning(images: np.ndarray) -> list[str]:
    """Warning if half of the images (uint8, N x C x H x W) are nearly black, such as 16 grey levels stored as 0 to 15; else nothing."""
    median = float(np.median(images.max((1, 2, 3))))
    if not 0 < median < 255 / DIM:
        return []
    remedy = "save them with values up to 255, if they are not meant to be that dark"
    return [f"WARNING: half of the images have no value above {median:g} of 255 and {DARK}; {remedy}"]


def sentence(depth: Mapping[str, Any], *, chosen: bool) -> str:
    """Note on the `depth` of dataset.json, in lower case and without full stop; `chosen`: the level is data.white_level."""
    how = "by data.white_level" if chosen else "from the range of values; set another with -S data.white_level=VALUE"
    cut = "; larger values are cut off" if depth["largest"] > depth["white_level"] else ""
    median = depth.get("median", depth["white_level"])  # missing in data prepared by older versions
    if not chosen and median < depth["white_level"] / DIM:
        cut = (
            f"; WARNING: half of them have no value above {median:.10g} and {DARK}: if only a few saturated or marked pixels exceed it, "
            f"set data.white_level={_holding(median) if median > 255 else median:.10g}"
        )
    return (
        f"{depth['images']} of the images have more than 8 bits per channel, with values up to {depth['largest']:.10g}: "
        f"{depth['white_level']:.10g} is white ({how}){cut}"
    )
