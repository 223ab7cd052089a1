"""Pictures of any format, mode and size -> uint8 arrays of one size.

Everything goes through Pillow, whose resampling is integer arithmetic: the same bytes on every machine. A picture
is turned upright (EXIF), brought to 8 bits, laid on white where it is transparent, turned grey (ITU-R 601 luma) or
RGB (CMYK without colour profile), scaled so that its shorter side fits (bilinear with antialias), and cropped at
its centre. Of animations and multi-page files the first frame counts.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from advml.errors import Failure

# A file with one of these names is meant to be a picture: if it cannot be read (HEIC among them), that is said.
SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Pillow goes by content, not by name. EPS and the like stay out: they would start an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
CHUNK = 64  # pictures per task: enough to make its overhead vanish
SMALL = 2.5e-4  # seconds per picture below which threads only wait for each other (measured: 32 x 32 JPEGs, 30 % slower with two)


def decode(path: Path, *, size: int, channels: int) -> np.ndarray:
    """The picture at `path` as uint8 (size, size, channels); raises whatever Pillow raises if it is broken."""
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    with Image.open(path, formats=_formats()) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG only: decodes large photographs at 1/2, 1/4 or 1/8
        image.load()
        _turn_upright(image)
        return fit(_eight_bits(image), size=size, channels=channels)


def fit(image: Image.Image, *, size: int, channels: int) -> np.ndarray:
    """An 8-bit picture as uint8 (size, size, channels)."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def fit_arrays(images: np.ndarray, *, size: int | None, channels: int | None) -> np.ndarray:
    """uint8 (N, C, H, W) -> uint8 (N, channels, size, size); None leaves as it is."""
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
        Images (uint8, count x channels x size x size) and `{index: reason}` of those that could not be read.
    Raises:
        Failure: if they do not fit into memory.
    """
    unreadable: dict[int, str] = {}

    def work(start: int, images: np.ndarray) -> int:
        for index in range(start, stop := min(start + CHUNK, count)):
            try:
                images[index] = read(index).transpose(2, 0, 1)
            except MemoryError:
                raise
            except Exception as error:  # a broken file may raise anything: OSError, SyntaxError, struct.error, ...
                unreadable[index] = _reason(error)
        return stop - start

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with warnings.catch_warnings(), Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        task = progress.add_task("reading images", total=count)
        pool = None
        try:
            images = np.empty((count, channels, size, size), dtype=np.uint8)
            began = time.perf_counter()
            progress.advance(task, work(0, images))
            small = time.perf_counter() - began < SMALL * CHUNK
            pool = ThreadPoolExecutor(1 if small else min(16, os.cpu_count() or 1))
            for done in pool.map(partial(work, images=images), range(CHUNK, count, CHUNK)):
                progress.advance(task, done)
        except MemoryError:
            raise Failure(
                f"{count} images of {channels}x{size}x{size} need {count * channels * size**2 / 2**30:.1f} GiB of memory; "
                "lower data.image_size or set data.max_train"
            ) from None
        finally:
            if pool:  # after Ctrl-C, do not decode the rest first
                pool.shutdown(cancel_futures=True)
    return images, dict(sorted(unreadable.items()))


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; it stumbles over others."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):  # pixels can be sound while their EXIF block is not: then taken as upright, as viewers do
        ImageOps.exif_transpose(image, in_place=True)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by 255/65535: by the range of the type, not by what one picture happens to use of it."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # 16-bit PGM comes as 32 bits
        return Image.fromarray(((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels of unknown range; save it with 8 or 16 bits")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image, or of a format that Pillow cannot read"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120] or type(error).__name__
