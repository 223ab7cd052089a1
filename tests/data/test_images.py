"""Picture files of any length of text and any number of pixels are opened, as far as there is memory."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import chunk, png
from PIL import Image

from advml.data import images
from advml.data.images import decode


@pytest.mark.parametrize(("kind", "place"), [("tEXt", "before"), ("zTXt", "before"), ("iTXt", "before"), ("iTXt", "after")])
def test_text_in_a_png_file_may_be_long(tmp_path, kind, place):
    text = b"x" * (70 * 2**20 if kind == "tEXt" else 3 * 2**20)
    body = {"tEXt": b"k\0" + text, "zTXt": b"k\0\0" + zlib.compress(text, 1), "iTXt": b"k\0\1\0\0\0" + zlib.compress(text, 1)}[kind]
    Image.new("L", (9, 9), 77).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    at = 33 if place == "before" else len(whole) - 12  # after IHDR, or before IEND
    (tmp_path / "x.png").write_bytes(whole[:at] + chunk(kind.encode(), body) + whole[at:])
    assert (decode(tmp_path / "x.png", size=4, channels=1) == 77).all()


def test_a_colour_profile_in_a_png_file_may_be_large(tmp_path):
    Image.new("L", (9, 9), 77).save(tmp_path / "x.png", icc_profile=b"\0" * 3 * 2**20)
    assert (decode(tmp_path / "x.png", size=4, channels=1) == 77).all()


def large(path: Path, side: int) -> Path:
    """A PNG file of side x side pixels of one bit, white."""
    path.write_bytes(png((side, side, 1, 0), (b"\0" + b"\xff" * (side // 8)) * side, level=1))
    return path


def test_a_picture_of_more_pixels_than_pillow_allows_is_decoded(tmp_path):
    path = large(tmp_path / "x.png", 13_600)  # 185 megapixels; Pillow's limit is 179
    assert (decode(path, size=4, channels=1) == 255).all()


def test_a_picture_that_does_not_fit_into_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = large(tmp_path / "x.png", 8_000)
    monkeypatch.setattr(images.memory, "available", lambda: 2**29)
    with pytest.raises(ValueError, match=r"8000 x 8000 .*1\.0 GiB .*0\.5 GiB"):
        decode(path, size=4, channels=1)


def test_a_large_jpeg_needs_the_memory_of_what_is_decoded_of_it(tmp_path, monkeypatch):
    Image.fromarray(np.full((6000, 6000), 200, np.uint8)).save(tmp_path / "x.jpg")
    monkeypatch.setattr(images.memory, "available", lambda: 0)
    assert (decode(tmp_path / "x.jpg", size=32, channels=1) == 200).all()  # at an eighth of its side
