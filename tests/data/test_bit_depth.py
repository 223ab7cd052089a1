"""Images of more than 8 bits get one white level per data set: found from the range in use, or chosen; said and recorded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from pictures import png16
from PIL import Image

from advml.config import Data
from advml.core.errors import UserError
from advml.data.bit_depth import warning
from advml.data.datasets import Dataset, load, prepare, remarks, save
from advml.data.images import decode


def tiff(values: np.ndarray, *, photometric: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF file of (H, W) or (H, W, 3) whole or floating-point numbers, with tags as the standard has them."""
    (height, width), bands = values.shape[:2], values.shape[2] if values.ndim == 3 else 1
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.itemsize * 8
    tags = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, bits), (259, 3, 1, 1), (262, 3, 1, photometric)),
        *(
            (273, 4, 1, 8),
            (277, 3, 1, bands),
            (278, 4, 1, height),
            (279, 4, 1, len(pixels)),
            (339, 3, bands, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]),
        ),
    ]
    directory, extra = 8 + len(pixels), b""
    after = directory + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, kind, count, value in tags:
        if count == 3:
            content = struct.pack(f"{order}I", after + len(extra))
            extra += struct.pack(f"{order}3H", *[value] * 3)
        else:
            content = struct.pack(f"{order}I" if kind == 4 else f"{order}HH", *((value,) if kind == 4 else (value, 0)))
        entries += struct.pack(f"{order}HHI", tag, kind, count) + content
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, directory)
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + extra


def ramp(top: int, *, dtype: str = "uint16") -> np.ndarray:
    """8 x 8 values from 0 to `top`."""
    return np.linspace(0, top, 64).reshape(8, 8).astype(dtype)


def write(root: Path, *files: bytes, suffix: str = "tif") -> Path:
    """Two classes with all files each, eight times: enough for three splits."""
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(8):
            for kind, content in enumerate(files):
                (root / label / f"{number}{kind}.{suffix}").write_bytes(content)
    return root


def prepared(root: Path, **changes) -> Dataset:
    settings = {"name": "folder", "path": str(root), "image_size": 8, "channels": 1, "validation": 0.1, "test": 0.2}
    return prepare(Data(**settings | changes))


def pictures(dataset: Dataset) -> list[np.ndarray]:
    """The different pictures, darkest first."""
    found = {image.numpy().tobytes(): image.numpy()[0] for split in dataset.splits.values() for image in split.images}
    return sorted(found.values(), key=lambda image: image.max())


@pytest.mark.parametrize(
    ("top", "white"), [(200, 255), (255, 255), (256, 511), (1000, 1023), (4095, 4095), (4096, 8191), (16000, 16383), (65535, 65535)]
)
def test_white_is_the_smallest_power_of_two_less_one_that_holds_all_values(tmp_path, top, white):
    dataset = prepared(write(tmp_path / "p", png16(ramp(top)), suffix="png"))
    assert dataset.depth == {"images": 16, "largest": top, "median": top, "white_level": white}
    (picture,) = pictures(dataset)
    assert (picture == np.rint(ramp(top).astype(float) * 255 / white)).all()


FORMS = {
    "png": (png16(ramp(3000)), "png"),
    "tiff": (tiff(ramp(3000)), "tif"),
    "tiff, big-endian": (tiff(ramp(3000), order=">"), "tif"),
    "signed 16 bits": (tiff(ramp(3000, dtype="int16")), "tif"),
    "signed 16 bits, big-endian": (tiff(ramp(3000, dtype="int16"), order=">"), "tif"),
    "32 bits": (tiff(ramp(3000, dtype="uint32")), "tif"),
    "signed 32 bits": (tiff(ramp(3000, dtype="int32")), "tif"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_file_with_12_bits_in_more_is_seen(tmp_path, form):
    content, suffix = FORMS[form]
    dataset = prepared(write(tmp_path / "p", content, suffix=suffix))
    assert dataset.depth == {"images": 16, "largest": 3000, "median": 3000, "white_level": 4095}
    assert (pictures(dataset)[0] == np.rint(ramp(3000).astype(float) * 255 / 4095)).all()


def test_the_level_is_one_for_all_images_and_leaves_those_of_8_bits_alone(tmp_path):
    root = write(tmp_path / "p", png16(ramp(700)), png16(ramp(4000)), suffix="png")
    Image.fromarray(ramp(250, dtype="uint8")).save(root / "a" / "eight.png")
    dataset = prepared(root)
    assert dataset.depth == {"images": 32, "largest": 4000, "median": 2350, "white_level": 4095}
    assert [picture.max() for picture in pictures(dataset)] == [round(700 * 255 / 4095), round(4000 * 255 / 4095), 250]


def test_a_chosen_level_is_taken_and_what_exceeds_it_is_cut_off_and_said(tmp_path):
    root = write(tmp_path / "p", png16(ramp(3000)), suffix="png")
    dataset = prepared(root, white_level=1000)
    assert (pictures(dataset)[0] == np.rint(ramp(3000).astype(float) * 255 / 1000).clip(0, 255)).all()
    assert dataset.depth == {"images": 16, "largest": 3000, "median": 3000, "white_level": 1000}
    said = remarks(dataset)[0]
    assert "1000" in said and "3000" in said and "cut off" in said
    full = prepared(root, white_level=65535)
    assert pictures(full)[0].max() == round(3000 / 257) and "cut off" not in remarks(full)[0]


def test_what_was_found_is_said_with_the_key_and_recorded(tmp_path):
    dataset = prepared(write(tmp_path / "p", png16(ramp(3000)), suffix="png"))
    (said, _) = remarks(dataset)
    assert "3000" in said and "4095" in said and "data.white_level" in said and "\n" not in said
    save(dataset, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["depth"] == dataset.depth == load(tmp_path / "out").depth


def test_one_saturated_pixel_that_makes_all_other_images_dark_is_said_with_the_remedy(tmp_path):
    root = write(tmp_path / "p", png16(ramp(3780)), suffix="png")
    assert "data.white_level=4095" not in remarks(prepared(root))[0]
    (root / "a" / "odd.png").write_bytes(png16(ramp(65535)))
    dataset = prepared(root)
    assert dataset.depth == {"images": 17, "largest": 65535, "median": 3780, "white_level": 65535}
    said = remarks(dataset)[0]
    assert "WARNING" in said and "3780" in said and "data.white_level=4095" in said and "\n" not in said
    bright = prepared(root, white_level=4095)
    assert pictures(bright)[0].max() == round(3780 * 255 / 4095) and "WARNING" not in remarks(bright)[0]


def test_dark_images_of_8_bits_are_said(tmp_path):
    """Digits of 16 grey levels saved as they are; half of bright ones are no reason."""
    dark, bright = np.full((3, 1, 2, 2), 16, dtype=np.uint8), np.full((3, 1, 2, 2), 200, dtype=np.uint8)
    (line,) = warning(dark)
    assert "WARNING" in line and "16 of 255" in line
    assert warning(np.concatenate([dark, bright])) == warning(bright) == warning(0 * dark) == []
    Image.fromarray(ramp(16, dtype="uint8")).save(tmp_path / "dark.png")
    assert line in remarks(prepared(write(tmp_path / "p", (tmp_path / "dark.png").read_bytes(), suffix="png")))
    deep = prepared(write(tmp_path / "q", png16(ramp(16)), suffix="png"))
    assert "data.white_level=16" in remarks(deep)[0]
    assert pictures(prepared(tmp_path / "q", white_level=16))[0].max() == 255


def test_a_level_without_effect_is_said(tmp_path):
    Image.fromarray(ramp(200, dtype="uint8")).save(tmp_path / "eight.png")
    dataset = prepared(write(tmp_path / "p", (tmp_path / "eight.png").read_bytes(), suffix="png"), white_level=4095)
    assert dataset.depth is None and "data.white_level = 4095" in remarks(dataset)[0]
    assert pictures(dataset)[0].max() == 200


def test_floating_point_needs_a_level_and_takes_it(tmp_path):
    root = write(tmp_path / "p", tiff(np.linspace(0, 2, 64, dtype=np.float32).reshape(8, 8)))
    with pytest.raises(UserError, match=r"16 images .*data\.white_level"):
        prepared(root)
    assert (pictures(prepared(root, white_level=2))[0] == np.rint(np.linspace(0, 2, 64, dtype=np.float32) * 127.5).reshape(8, 8)).all()


@pytest.mark.parametrize("lowest", [-1000, np.nan, np.inf])
def test_values_below_zero_or_without_a_size_are_refused(tmp_path, lowest):
    values = ramp(3000, dtype="int16" if lowest == -1000 else "float32")
    values[0, 0] = lowest
    (tmp_path / "x.tif").write_bytes(tiff(values))
    with pytest.raises(ValueError, match="values from"):
        decode(tmp_path / "x.tif", size=8, channels=1, white=4095)


def test_a_tiff_whose_zero_is_white_is_turned(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(ramp(65535), photometric=0))
    assert (decode(tmp_path / "x.tif", size=8, channels=1)[..., 0] == 255 - np.rint(ramp(65535) / 257)).all()


@pytest.mark.parametrize("name", ["rgb.png", "rgb.tif"])
def test_dim_colours_of_16_bits_are_refused_because_only_their_upper_half_is_read(tmp_path, name):
    values = np.repeat(ramp(4000)[..., None], 3, axis=2)
    content = png16(values) if name == "rgb.png" else tiff(values, photometric=2)
    root = write(tmp_path / "p", content, suffix=name[-3:])
    with pytest.raises(UserError, match=r"4095.*-S data\.white_level=65535") as error:
        prepared(root, channels=3)
    assert "\n" not in str(error.value)
    assert pictures(prepared(root, channels=3, white_level=65535))[0].max() == 4000 // 256
    with pytest.raises(UserError, match=r"data\.white_level = 4095"):
        prepared(root, channels=3, white_level=4095)


def test_colours_that_use_all_16_bits_are_taken(tmp_path):
    dataset = prepared(write(tmp_path / "p", png16(np.repeat(ramp(65535)[..., None], 3, axis=2)), suffix="png"), channels=3)
    assert dataset.depth["white_level"] == 65535 and pictures(dataset)[0].max() == 255


PGM = {"binary": (b"P5", ramp(1000).astype(">u2").tobytes()), "plain": (b"P2", " ".join(map(str, ramp(1000).flatten())).encode())}


@pytest.mark.parametrize("kind", PGM)
def test_a_pgm_file_says_its_range_unless_it_calls_all_16_bits_its_own(tmp_path, kind):
    magic, values = PGM[kind]
    says = prepared(write(tmp_path / "says", magic + b" 8 8 4095\n" + values, suffix="pgm"), white_level=77)
    assert says.depth is None and pictures(says)[0].max() == round(1000 * 255 / 4095)
    silent = prepared(write(tmp_path / "silent", magic + b" 8 8 65535\n" + values, suffix="pgm"))
    assert silent.depth["white_level"] == 1023 and pictures(silent)[0].max() == round(1000 * 255 / 1023)


def test_a_jpeg_2000_file_of_16_bits_with_12_in_use_is_seen(tmp_path):
    Image.fromarray(ramp(3000)).save(tmp_path / "x.jp2", irreversible=False)
    dataset = prepared(write(tmp_path / "p", (tmp_path / "x.jp2").read_bytes(), suffix="jp2"))
    assert dataset.depth["white_level"] == 4095 and pictures(dataset)[0].max() == round(3000 * 255 / 4095)


def test_a_photo_for_a_model_is_read_with_the_level_of_its_training_data(tmp_path):
    (tmp_path / "dim.png").write_bytes(png16(ramp(900)))
    assert decode(tmp_path / "dim.png", size=8, channels=1, white=4095).max() == round(900 * 255 / 4095)
    assert decode(tmp_path / "dim.png", size=8, channels=1).max() == round(900 * 255 / 1023)


def test_a_bmp_file_of_16_bits_per_pixel_has_fewer_than_8_per_channel(tmp_path):
    masks, pixels = (0xF800, 0x7E0, 0x1F), np.full((8, 8), 0x8410, dtype="<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, len(pixels), 0, 0, 0, 0) + struct.pack("<3I", *masks)
    content = struct.pack("<2sIHHI", b"BM", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels
    dataset = prepared(write(tmp_path / "p", content, suffix="bmp"), channels=3)
    assert dataset.depth is None and 128 <= pictures(dataset)[0].max() <= 132
