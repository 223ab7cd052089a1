"""Decode image files of any format, mode and size to uint8 arrays of one size.

Pillow does all the work; its resampling is integer arithmetic, so the bytes are the same on every machine. An image is turned upright
(EXIF), converted to 8 bits (see `bit_depth`), put on white where it is transparent, converted to grey (ITU-R 601 luma) or RGB (CMYK
without colour profile), scaled so that its shorter side fits (bilinear with antialias), and cropped at its centre. Of animations and
multi-page files, the first frame is used.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from advml.core import memory
from advml.core.errors import Failure
from advml.core.paths import Workspace
from advml.core.progress import Bar
from advml.data.bit_depth import FULL, GREY, Depth, Largest, eight_bits, is_deep, largest, settle

# Opening files: formats, memory, orientation

# Pillow recognises formats by content, not by name. EPS and similar ones are excluded, because they would start an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
LARGE = 2**25  # pixels from which pictures are decoded one at a time
BYTES_PER_PIXEL = 16  # memory while a picture is decoded, rotated and converted

# Pillow's limits protect servers from uploads; these files are the user's own, and are limited by the available memory (`_room_for`).
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes of text in a PNG file

_one_at_a_time = threading.Lock()


@contextmanager
def opened(path: Path, *, size: int) -> Iterator[tuple[Image.Image, bool]]:
    """Context manager: the picture at `path`, decoded and upright, and whether it has more than 8 bits per channel (see `bit_depth`)."""
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    with Image.open(path, formats=_formats()) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG only: decodes large photographs at 1/2, 1/4 or 1/8
        deep = is_deep(image)
        with _room_for(image):
            image.load()
            with suppress(Exception):  # pixels may be readable while EXIF is damaged: then, as in viewers, no rotation
                ImageOps.exif_transpose(image, in_place=True)
            yield image, deep


@contextmanager
def _room_for(image: Image.Image) -> Iterator[None]:
    """Context manager that admits one large picture at a time, and raises ValueError for one that does not fit into memory."""
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
    """Those of FORMATS that the installed Pillow supports; it raises an error for others."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


# Decoding to arrays of one size

# Files with these suffixes count as images; unreadable ones (such as HEIC) are reported.
SUFFIXES = frozenset(
    (
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    )
)
# Pictures that are not read; of a camera's raw files Pillow would see the thumbnail.
UNREAD = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"),
        *(".dcm", ".exr", ".hdr", ".jxl", ".npy", ".npz", ".nii", ".pcx", ".psd", ".svg", ".tga", ".xcf"),
    )
)
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
CHUNK = 64  # pictures per task, so that the overhead of a task is negligible
SMALL = 2.5e-4  # seconds per picture below which threads do not pay (measured: 32 x 32 JPEGs, 30 % slower with two)


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images.

    Attributes:
        images: uint8, (n, C, H, W).
        unreadable: position -> reason, for images that could not be read; their pixels are undefined.
        depth: statistics of the images with more than 8 bits per channel.
    """

    images: np.ndarray
    unreadable: Mapping[int, str] = field(default_factory=dict)
    depth: Depth | None = None


def read_files(paths: Sequence[Path], *, size: int, channels: int, white: float | None) -> Pixels:
    """Decode the pictures at `paths` to one size.

    Args:
        white: `data.white_level`; None: pictures with more than 8 bits are read twice, first to find their range of values.
    Raises:
        UserError: they do not fit into memory, or 16-bit colour images cannot be scaled to `white`.
    """
    found: dict[int, Largest] = {}

    def read(index: int, white: float | None = white) -> np.ndarray:
        with opened(paths[index], size=size) as (image, deep):
            if deep:
                found[index] = largest(image, white=white)
                if white is None:
                    return np.zeros((size, size, channels), dtype=np.uint8)
            return fit(eight_bits(image, white=white if deep else FULL), size=size, channels=channels)

    images, unreadable = read_all(read, len(paths), size=size, channels=channels)
    if not found:
        return Pixels(images, unreadable)
    depth = settle(found.values(), white=white)
    if white is None:
        unreadable |= _fill(images, partial(read, white=depth.white_level), sorted(found))
    return Pixels(images, unreadable, depth)


def decode(path: Path, *, size: int, channels: int, white: float | None = None) -> np.ndarray:
    """Decode the picture at `path` to uint8 (size, size, channels); for a broken file, raises any error of Pillow.

    Args:
        white: value of white for a grey image with more than 8 bits; None: from its range of values, as for a dataset.
    """
    with opened(path, size=size) as (image, deep):
        unknown = deep and image.mode in GREY
        level = settle([largest(image, white=white)], white=white).white_level if unknown else FULL
        return fit(eight_bits(image, white=level), size=size, channels=channels)


def fit(image: Image.Image, *, size: int, channels: int) -> np.ndarray:
    """Convert an 8-bit picture to uint8 (size, size, channels)."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def fit_arrays(images: np.ndarray, *, size: int | None, channels: int | None) -> np.ndarray:
    """Convert uint8 (N, C, H, W) to uint8 (N, channels, size, size); None keeps channels or size."""
    native, side = images.shape[1], images.shape[2]
    size, channels = size or side, channels or native
    if (channels, size) == (native, side):
        return images

    def one(index: int) -> np.ndarray:
        pixels = images[index].transpose(1, 2, 0).squeeze(2) if native == 1 else images[index].transpose(1, 2, 0)
        return fit(Image.fromarray(np.ascontiguousarray(pixels)), size=size, channels=channels)

    return read_all(one, len(images), size=size, channels=channels)[0]


def read_all(read: Callable[[int], np.ndarray], count: int, *, size: int, channels: int) -> tuple[np.ndarray, dict[int, str]]:
    """Call `read` for 0 .. count-1 in a thread pool, with a progress bar if stderr is a terminal.

    Returns:
        Images (uint8, count x channels x size x size), and index -> reason for those that could not be read.
    Raises:
        UserError: the images fit neither into memory nor on the disk.
        Failure: the memory could not be allocated nevertheless.
    """
    need, remedy = count * channels * size**2, "lower data.image_size or set data.max_train"
    try:
        images = room_for_all((count, channels, size, size), remedy)
        return images, _fill(images, read, range(count))
    except MemoryError:
        raise Failure(f"{count} images of {channels}x{size}x{size} need {need / 2**30:.1f} GiB of memory; {remedy}") from None


def room_for_all(shape: tuple[int, int, int, int], remedy: str) -> np.ndarray:
    """Empty uint8 array in memory or, if it is too large, in an anonymous file, which disappears with the process."""
    count, *side = shape
    workspace, what = Workspace(), f"{count} images of {'x'.join(map(str, side))}"
    if memory.fits_in_memory(math.prod(shape), what=what, folder=workspace.root, remedy=remedy):
        return np.empty(shape, dtype=np.uint8)
    (folder := workspace.scratch("prepare")).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


def _fill(images: np.ndarray, read: Callable[[int], np.ndarray], indices: Sequence[int]) -> dict[int, str]:
    """Write `read(index)` to `images[index]`; returns index -> reason for those that could not be read."""
    unreadable: dict[int, str] = {}

    def work(start: int) -> int:
        chunk = indices[start : start + CHUNK]
        for index in chunk:
            try:
                images[index] = read(index).transpose(2, 0, 1)
            except MemoryError:
                raise
            except Exception as error:  # a broken file may raise anything: OSError, SyntaxError, struct.error, ...
                unreadable[index] = _reason(error)
        return len(chunk)

    with warnings.catch_warnings(), Bar("reading images", total=len(indices), brief=True) as bar:
        warnings.simplefilter("ignore")  # Pillow warns of unusual metadata
        began = time.perf_counter()
        bar.advance(work(0))
        small = time.perf_counter() - began < SMALL * CHUNK
        pool = ThreadPoolExecutor(1 if small else min(16, os.cpu_count() or 1))
        try:
            for done in pool.map(work, range(CHUNK, len(indices), CHUNK)):
                bar.advance(done)
        finally:  # after Ctrl-C, skip the remaining tasks
            pool.shutdown(cancel_futures=True)
    return dict(sorted(unreadable.items()))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that Pillow cannot read"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120] or type(error).__name__
