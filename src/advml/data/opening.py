"""Opens picture files: which formats, how large, and the right way up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin

from advml.data.depth import is_deep
from advml.runtime import memory

# Pillow goes by content, not by name. EPS and the like stay out: they would start an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
LARGE = 2**25  # pixels from which pictures are decoded one at a time
BYTES_PER_PIXEL = 16  # while a picture is decoded, turned and converted

# Pillow's limits are meant for servers. These are the user's own files: memory bounds a picture here (`_room_for`).
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes of text in a PNG file

_one_at_a_time = threading.Lock()


@contextmanager
def opened(path: Path, *, size: int) -> Iterator[tuple[Image.Image, bool]]:
    """The picture at `path`, decoded and upright, and whether it is deep (see `depth`)."""
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    with Image.open(path, formats=_formats()) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG only: decodes large photographs at 1/2, 1/4 or 1/8
        deep = is_deep(image)
        with _room_for(image):
            image.load()
            _turn_upright(image)
            yield image, deep


@contextmanager
def _room_for(image: Image.Image) -> Iterator[None]:
    """Lets one large picture at a time into memory, and none that does not fit."""
    pixels = image.width * image.height
    if pixels <= LARGE:
        yield
        return
    with _one_at_a_time:
        if (need := pixels * BYTES_PER_PIXEL) > (left := memory.available()):
            size = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{size} need {need / 2**30:.1f} GiB of memory to decode, and {left / 2**30:.1f} GiB are available")
        yield


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; it stumbles over others."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):  # pixels can be sound while their EXIF block is not: then taken as upright, as viewers do
        ImageOps.exif_transpose(image, in_place=True)
