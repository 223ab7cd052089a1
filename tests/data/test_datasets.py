"""Datasets: every kind of picture, every way a folder can be wrong, splits, and what lies on disk."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import resource
import shutil
import socket
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import png16
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from advml.config import Data
from advml.core.errors import Failure, UserError
from advml.data import cifar as cifar_module
from advml.data import folder_tree as tree_module
from advml.data import prepared
from advml.data.cifar import CIFAR10, CIFAR100, Archive, cifar
from advml.data.datasets import DATASETS, Dataset, Split, channel_statistics, load, prepare, save
from advml.data.image_folder import fingerprint
from advml.data.images import decode, fit_arrays, opened, read_all
from advml.data.splits import Source, _allocate, divide

DIGITS_DIGEST = "7d412e4d54caf25e75ef72d64fb6f91fc15d1ed9339b252c4fadce35c41d9ed2"


def settings_for(name: str, **changes) -> Data:
    return Data(**{"name": name, "validation": 0.1, "test": 0.2, **changes})


def noise(seed: int, *, width: int = 20, height: int = 14) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tree(root: Path, classes: dict[str, int], *, seed: int = 0) -> Path:
    """`classes`: folder -> number of pictures, all different."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            seed += 1
            noise(seed, width=10 + seed % 5).save(root / name / f"{index:03}.png")
    return root


def photos(root: Path, **changes) -> Data:
    return settings_for("folder", **{"path": str(root), "image_size": 8, **changes})


def hashes(split: Split) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in split.images]


def per_class(split: Split) -> list[int]:
    return torch.bincount(split.labels).tolist()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return prepare(settings_for("digits"))


# Digits


def test_digits_are_the_scans_of_scikit_learn_with_16_grey_levels_stretched_to_255(digits):
    original = load_digits()
    rows = {image.tobytes(): label for image, label in zip(original.images.astype(np.uint8), original.target, strict=True)}
    for split in digits.splits.values():
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.images.shape[1:] == (1, 8, 8)
        for image, label in zip(split.images[:, 0].numpy(), split.labels.tolist(), strict=True):
            assert rows[np.rint(image / 255 * 16).astype(np.uint8).tobytes()] == label
    assert digits.train.images.max() == 255
    assert digits.classes == tuple("0123456789")


def test_the_splits_of_digits_are_the_same_on_every_machine(digits):
    assert {name: len(split) for name, split in digits.splits.items()} == {"train": 1258, "validation": 180, "test": 359}
    assert digits.digest == DIGITS_DIGEST


def test_another_seed_gives_other_splits_of_the_same_sizes(digits):
    other = prepare(settings_for("digits", seed=1))
    assert other.digest != digits.digest
    assert [len(split) for split in other.splits.values()] == [len(split) for split in digits.splits.values()]


def test_image_size_and_channels_apply_to_digits_too(digits):
    larger = prepare(settings_for("digits", image_size=16, channels=3))
    assert larger.shape == (3, 16, 16)
    assert (larger.test.images[:, 0] == larger.test.images[:, 2]).all()
    shrunk = larger.test.images[:, 0].float().unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    assert (shrunk - digits.test.images[:, 0]).abs().mean() < 25  # still the same digits


# Splits


def test_splits_are_disjoint_complete_and_keep_the_class_proportions(digits):
    labels = load_digits().target
    parts = divide(Source("", digits.classes, labels, None), settings_for("digits"))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    whole = np.bincount(labels) / len(labels)
    for indices in parts.values():
        assert np.abs(np.bincount(labels[indices]) - whole * len(indices)).max() < 1.01


def test_each_split_mixes_its_classes_because_a_contrastive_attack_sees_whole_batches(tmp_path):
    dataset = prepare(photos(write_tree(tmp_path / "p", {"a": 60, "b": 60})))
    for split in dataset.splits.values():
        assert (split.labels.diff() != 0).sum() > len(split) / 4


def test_max_train_and_max_test_are_exact_stratified_and_leave_validation_alone(digits):
    small = prepare(settings_for("digits", max_train=303, max_test=57))
    assert (len(small.train), len(small.test)) == (303, 57)
    for part, whole in ((small.train, digits.train), (small.test, digits.test)):
        shares = torch.bincount(whole.labels) / len(whole) * len(part)
        assert (torch.bincount(part.labels) - shares).abs().max() < 1.01
        assert set(hashes(part)) <= set(hashes(whole))
    assert hashes(small.validation) == hashes(digits.validation)


def test_a_smaller_max_train_keeps_a_subset_of_a_larger_one():
    large, small = (prepare(settings_for("digits", max_train=maximum)) for maximum in (500, 100))
    assert set(hashes(small.train)) < set(hashes(large.train))


def test_a_rare_class_is_in_every_split(tmp_path):
    dataset = prepare(photos(write_tree(tmp_path / "p", {"common": 60, "rare": 3}), max_train=10))
    assert all(1 in split.labels for split in dataset.splits.values())
    assert len(dataset.train) == 10


def test_large_shares_still_leave_every_class_to_every_split(tmp_path):
    dataset = prepare(photos(write_tree(tmp_path / "p", {"a": 4, "b": 3}), test=0.6, validation=0.39))
    assert [per_class(split) for split in (dataset.train, dataset.validation, dataset.test)] == [[1, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("key", ["max_train", "max_test"])
def test_a_maximum_below_the_number_of_classes_is_an_error(key):
    with pytest.raises(UserError, match=rf"data\.{key} = 9 .*10"):
        prepare(settings_for("digits", **{key: 9}))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(2, 400), min_size=2, max_size=12), st.floats(0, 1))
def test_allocation_is_exact_and_within_one_of_the_quota_unless_a_limit_binds(counts, share):
    counts = np.array(counts)
    limits = counts - 1
    total = int(np.clip(round(share * counts.sum()), len(counts), limits.sum()))
    sizes = _allocate(counts, total, limits)
    assert sizes.sum() == total
    assert (sizes >= 1).all() and (sizes <= limits).all()
    quotas = counts * total / counts.sum()
    if (quotas >= 1).all() and (quotas <= limits).all():
        assert np.abs(sizes - quotas).max() < 1 + 1e-9


# Pictures


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def palette(*, transparent: bool) -> bytes:
    image = Image.new("P", (9, 9), 0)
    image.putpalette([200, 100, 50] + [0, 0, 0] * 255)
    return encoded(image, "GIF", **({"transparency": 0} if transparent else {}))


FLAT = {  # file -> (bytes, the colour they show)
    "rgb.png": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "PNG"), (200, 100, 50)),
    "rgb.bmp": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "BMP"), (200, 100, 50)),
    "rgb.webp": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50)),
    "rgb.tif": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "TIFF"), (200, 100, 50)),
    "rgb.ppm": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "PPM"), (200, 100, 50)),
    "UPPER.JPG": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "JPEG", quality=100), (200, 100, 50)),
    "grey.jpg": (encoded(Image.new("L", (9, 9), 77), "JPEG"), (77, 77, 77)),
    "bits.png": (encoded(Image.new("1", (9, 9), 1), "PNG"), (255, 255, 255)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "cmyk.tif": (encoded(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "alpha.png": (encoded(Image.new("RGBA", (9, 9), (200, 100, 50, 0)), "PNG"), (255, 255, 255)),
    "half.png": (encoded(Image.new("LA", (9, 9), (0, 128)), "PNG"), (127, 127, 127)),
    "palette.gif": (palette(transparent=False), (200, 100, 50)),
    "transparent.gif": (palette(transparent=True), (255, 255, 255)),
    "grey16.png": (encoded(Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)), "PNG"), (200, 200, 200)),
    "grey16.tif": (encoded(Image.fromarray(np.full((9, 9), 200 * 257 + 100, dtype=np.uint16)), "TIFF"), (200, 200, 200)),
    "grey16.pgm": (b"P5 9 9 65535\n" + np.full(81, 200 * 257, dtype=">u2").tobytes(), (200, 200, 200)),
    "rgb16.png": (png16(np.full((9, 9, 3), (200 * 257, 100 * 257, 50 * 257))), (200, 100, 50)),
    "rgba16.png": (png16(np.full((9, 9, 4), (0, 0, 0, 0))), (255, 255, 255)),
    "movie.gif": (
        encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        (200, 100, 50),
    ),
    "phone.jpg": (
        encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        (200, 100, 50),
    ),
    "disguised.jpg": (encoded(Image.new("RGB", (9, 9), (200, 100, 50)), "PNG"), (200, 100, 50)),
}


@pytest.mark.parametrize("name", FLAT)
def test_every_kind_of_picture_is_read_as_a_person_sees_it(tmp_path, name):
    content, colour = FLAT[name]
    (tmp_path / name).write_bytes(content)
    pixels = decode(tmp_path / name, size=6, channels=3)
    assert pixels.shape == (6, 6, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= 2
    luma = np.dot(colour, (0.299, 0.587, 0.114))
    assert np.abs(decode(tmp_path / name, size=6, channels=1).astype(int) - luma).max() <= 2


def test_every_kind_of_picture_can_stand_in_one_folder(tmp_path):
    for name, (content, _) in FLAT.items():
        for label in ("a", "b"):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / name).write_bytes(content)
    dataset = prepare(photos(tmp_path, channels=1))
    assert sum(len(split) for split in dataset.splits.values()) == 2 * len(FLAT)
    assert dataset.shape == (1, 8, 8) and not dataset.skipped and not dataset.ignored


def test_the_whole_16_bit_range_is_used_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    (tmp_path / "ramp.png").write_bytes(encoded(Image.fromarray(values), "PNG"))
    assert (decode(tmp_path / "ramp.png", size=8, channels=1)[..., 0] == np.rint(values / 257)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_honoured(tmp_path, format):
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))  # stored: white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: white on top
    image.save(tmp_path / "turned.img", format, exif=exif)
    pixels = decode(tmp_path / "turned.img", size=32, channels=1)[..., 0].astype(int)
    assert pixels[:14].min() > 240 and pixels[18:].max() < 15


def test_a_damaged_exif_block_costs_neither_the_picture_nor_a_warning(tmp_path):
    blocks = (b"Exif\0\0garbage garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff")
    for index, block in enumerate(blocks):
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{index}.jpg", exif=block, quality=100)
    images, unreadable = read_all(lambda index: decode(tmp_path / f"{index}.jpg", size=9, channels=3), 2, size=9, channels=3)
    assert not unreadable
    assert images[:, :, 0, 0].tolist() == [[254, 0, 0]] * 2


def test_the_shorter_side_is_scaled_with_antialias_and_the_centre_kept(tmp_path):
    stripes = np.zeros((40, 120), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: grey, where plain sampling gives black or white
    stripes[:, :35], stripes[:, 85:] = 0, 255  # outside of the centre square, columns 40 to 79
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.T.copy()).save(tmp_path / "tall.png")
    wide = decode(tmp_path / "wide.png", size=10, channels=1)[..., 0]
    assert np.abs(wide.astype(int) - 127).max() <= 24
    assert (decode(tmp_path / "tall.png", size=10, channels=1)[..., 0] == wide.T).all()


def test_a_large_jpeg_decoded_small_equals_the_same_decoded_whole(tmp_path):
    image = noise(1, width=64, height=64).resize((256, 256), Image.Resampling.BICUBIC)
    image.save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as whole:
        expected = np.asarray(ImageOps.fit(whole.convert("RGB"), (32, 32), method=Image.Resampling.BILINEAR))
    difference = np.abs(decode(tmp_path / "large.jpg", size=32, channels=3).astype(int) - expected)
    assert difference.mean() < 2 and difference.max() <= 10


def test_pictures_smaller_than_image_size_are_enlarged(tmp_path):
    noise(0, width=3, height=2).save(tmp_path / "tiny.png")
    assert decode(tmp_path / "tiny.png", size=16, channels=3).shape == (16, 16, 3)


def test_arrays_are_turned_grey_by_luma_and_left_alone_if_they_fit():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], dtype=np.uint8)[:, :, None, None] * np.ones((4, 4), np.uint8)
    assert fit_arrays(colours, size=None, channels=None) is colours
    assert fit_arrays(colours, size=None, channels=1)[:, 0, 0, 0].tolist() == [76, 150, 29, 9]
    assert fit_arrays(colours, size=8, channels=3)[:, :, 7, 7].tolist() == colours[:, :, 0, 0].tolist()


def test_all_chunks_are_read_in_order_by_several_threads(monkeypatch):
    monkeypatch.setattr("advml.data.images.SMALL", 0)  # as if each picture took long
    images, unreadable = read_all(lambda index: np.full((2, 2, 1), 100 // (index - 150), np.int16) % 256, 200, size=2, channels=1)
    assert list(unreadable.items()) == [(150, "integer division or modulo by zero")]
    expected = [100 // (index - 150) % 256 for index in range(200) if index != 150]
    assert np.delete(images[:, 0, 1, 1], 150).tolist() == expected


def test_a_dataset_that_does_not_fit_into_memory_is_one_line(monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("advml.core.memory.available", lambda: 2**40)
    monkeypatch.setattr("advml.data.images.np.empty", full)
    with pytest.raises(Failure, match=r"3\.0 GiB .*data\.image_size .*data\.max_train"):
        read_all(lambda index: None, 2**20, size=32, channels=3)


def test_the_progress_bar_shows_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    data = photos(write_tree(tmp_path / "p", {"a": 10, "b": 10}))
    quiet = prepare(data)
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert prepare(data).digest == quiet.digest
    assert "reading images" in terminal.getvalue() and "100 %" in terminal.getvalue()


# Folders of images


def test_a_flat_tree_is_divided(tmp_path):
    dataset = prepare(photos(write_tree(tmp_path / "p", {"cats": 30, "dogs": 20})))
    assert dataset.classes == ("cats", "dogs")
    assert [per_class(split) for split in (dataset.train, dataset.validation, dataset.test)] == [[21, 14], [3, 2], [6, 4]]
    assert len({code for split in dataset.splits.values() for code in hashes(split)}) == 50


def test_the_test_folder_stays_the_test_split(tmp_path):
    root = write_tree(tmp_path / "p", {"train/a": 20, "train/b": 20})
    write_tree(root, {"test/a": 3, "test/b": 5}, seed=500)
    dataset = prepare(photos(root))
    assert per_class(dataset.test) == [3, 5]
    assert per_class(dataset.validation) == [2, 2]  # a share of the training images
    expected = [decode(path, size=8, channels=3).transpose(2, 0, 1) for path in sorted((root / "test").rglob("*.png"))]
    assert sorted(hashes(dataset.test)) == sorted(hashlib.sha256(np.ascontiguousarray(image)).hexdigest() for image in expected)


def test_the_digest_depends_on_pixels_and_names_but_not_on_the_path(tmp_path):
    one, same, other = (
        prepare(photos(write_tree(tmp_path / name, {"a": 9, "b": 9}, seed=seed))) for name, seed in (("x", 0), ("y", 0), ("z", 1))
    )
    assert one.digest == same.digest != other.digest
    renamed = prepare(photos(write_tree(tmp_path / "w", {"a": 9, "c": 9})))
    assert renamed.digest != one.digest


def test_the_order_in_which_the_file_system_lists_files_does_not_matter(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "p", {"a/x": 6, "a/y": 6, "b": 12})
    expected = prepare(photos(root)).digest
    walk = os.walk

    def backwards(*arguments, **options):
        for parent, folders, files in walk(*arguments, **options):
            folders.sort(reverse=True)
            files.sort(reverse=True)
            yield parent, folders, files

    monkeypatch.setattr(tree_module.os, "walk", backwards)
    assert prepare(photos(root)).digest == expected


def test_only_the_images_that_max_train_keeps_are_decoded(tmp_path, monkeypatch):
    root, seen = write_tree(tmp_path / "p", {"a": 40, "b": 40}), []
    monkeypatch.setattr("advml.data.images.opened", lambda path, **sizes: seen.append(path) or opened(path, **sizes))
    prepare(photos(root, max_train=6))
    assert len(seen) == 6 + 8 + 16


def broken_tree(root: Path) -> Path:
    """Five broken pictures of 45; the other 40 are sound."""
    write_tree(root, {"a": 20, "b": 20})
    whole = (root / "a" / "000.png").read_bytes()
    jpeg = encoded(noise(0, width=60, height=60), "JPEG")
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "short.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "short.jpg").write_bytes(jpeg[: len(jpeg) * 9 // 10])
    (root / "b" / "text.jpeg").write_text("<html>404</html>")
    (root / "b" / "script.gif").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    return root


def test_corrupt_images_stop_with_their_paths_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = broken_tree(Path("p"))
    with pytest.raises(UserError) as error:
        prepare(photos(root))
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("5 images cannot be read: p/a/empty.png: empty file; p/a/short.png: ")
    assert "and 2 more, listed in .scratch/prepare/unreadable.txt" in line
    assert line.endswith("-S data.skip_corrupt=true")
    listed = Path(".scratch/prepare/unreadable.txt").read_text().splitlines()
    assert [row.split(": ")[0] for row in listed] == [
        f"p/{name}" for name in ("a/empty.png", "a/short.png", "b/script.gif", "b/short.jpg", "b/text.jpeg")
    ]


def test_skipped_images_are_left_out_counted_and_recorded(tmp_path):
    dataset = prepare(photos(broken_tree(tmp_path / "p"), skip_corrupt=True))
    names = [line.split(": ")[0] for line in dataset.skipped]
    assert names == ["a/empty.png", "a/short.png", "b/script.gif", "b/short.jpg", "b/text.jpeg"]
    assert all(line.split(": ", 1)[1] for line in dataset.skipped)
    sound = {
        hashlib.sha256(np.ascontiguousarray(decode(path, size=8, channels=3).transpose(2, 0, 1))).hexdigest()
        for path in (tmp_path / "p").rglob("0*.png")
    }
    kept = [code for split in dataset.splits.values() for code in hashes(split)]
    assert len(kept) == 40 and set(kept) == sound


def test_labels_stay_with_their_images_when_some_are_skipped(tmp_path):
    root = tmp_path / "p"
    for label, grey in (("dark", 10), ("light", 240)):
        (root / label).mkdir(parents=True)
        for index in range(30):
            Image.new("L", (8, 8), grey).save(root / label / f"{index}.png")
        for index in range(0, 30, 4):
            (root / label / f"{index}.png").write_bytes(b"")
    dataset = prepare(photos(root, skip_corrupt=True))
    assert len(dataset.skipped) == 16
    for split in dataset.splits.values():
        assert ((split.images[:, 0, 0, 0] > 128).long() == split.labels).all()


def test_a_class_left_empty_by_skipping_is_an_error(tmp_path):
    root = write_tree(tmp_path / "p", {"a": 9, "b": 9})
    for path in (root / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="class 'b' has no image left in train"):
        prepare(photos(root, skip_corrupt=True))


def test_a_relative_path_that_a_queue_workers_copy_lacks_starts_at_the_root_of_the_study(tmp_path, monkeypatch):
    write_tree(tmp_path / "study" / "photos", {"a": 5, "b": 5})
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(UserError, match=r"data\.path = 'photos' does not exist"):
        prepare(photos("photos"))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "study"))
    assert prepare(photos("photos")).classes == ("a", "b")
    write_tree(tmp_path / "copy" / "photos", {"c": 5, "d": 5})
    assert prepare(photos("photos")).classes == ("c", "d")


def test_cifar_is_downloaded_to_the_root_of_the_study_not_to_a_queue_workers_copy(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", "/study")
    with pytest.raises((UserError, Failure), match=r"/study/data/raw"):
        prepare(settings_for("cifar10"))


@pytest.mark.parametrize("change", ["more", "less", "other content", "same content, other name"])
def test_the_fingerprint_of_a_folder_changes_with_its_images(tmp_path, change):
    data = photos(write_tree(tmp_path / "p", {"a": 2, "b": 2}))
    before = fingerprint(data)
    (tmp_path / "p" / "a" / "note.txt").write_text("no image")
    assert before == fingerprint(data) and len(before) == 16
    first = tmp_path / "p" / "a" / "000.png"
    if change == "more":
        noise(9).save(tmp_path / "p" / "a" / "new.png")
    elif change == "less":
        first.unlink()
    elif change == "other content":
        first.write_bytes(first.read_bytes()[::-1])
        os.utime(first, ns=(0, first.stat().st_mtime_ns + 1))  # file systems with coarse clocks
    else:
        first.rename(first.with_name("renamed.png"))
    assert fingerprint(data) != before


def test_images_that_are_not_here_have_no_fingerprint(tmp_path):
    assert fingerprint(photos(tmp_path / "absent")) is None


WRONG_TREES = {
    "no class folders": ({}, r"contains no class folders; put the images of each class .* e\.g\. .*/cats/1\.jpg"),
    "one class": ({"a": 9}, r"contains only one class \('a'\)"),
    "few images": ({"a": 9, "b": 2}, r"class 'b' has 2 images; train, validation, test need one each"),
    "one image": ({"a": 9, "b": 1, "c": 1}, r"class 'b' has 1 image \(2 classes are that small\)"),
    "few to share": ({"train/a": 9, "train/b": 1, "test/a": 2, "test/b": 2}, r"class 'b' has 1 image; train, validation need"),
    "empty class": ({"a": 9, "b": 0}, r"p/b contains no images; add some or remove the folder"),
    "empty test class": ({"train/a": 9, "train/b": 9, "test/a": 2, "test/b": 0}, r"test/b contains no images"),
    "test lacks": ({"train/a": 9, "train/b": 9, "test/a": 2}, r"class 'b' is in .*train but not in .*test"),
    "test has more": ({"train/a": 9, "train/b": 9, "test/a": 2, "test/b": 2, "test/c": 2}, r"class 'c' is in .*test but not in .*train"),
}


@pytest.mark.parametrize("case", WRONG_TREES)
def test_a_wrong_tree_is_explained_in_one_line(tmp_path, case):
    classes, message = WRONG_TREES[case]
    root = tmp_path / "p"
    root.mkdir()
    (root / "loose.png").write_bytes(b"")
    with pytest.raises(UserError, match=message) as error:
        prepare(photos(write_tree(root, classes)))
    assert "\n" not in str(error.value)


def test_a_missing_path_or_an_archive_instead_of_a_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"data\.path = '.*nowhere' .*-S data\.path=FOLDER"):
        prepare(photos(tmp_path / "nowhere"))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"is a file; .*name the folder"):
        prepare(photos(tmp_path / "photos.zip"))


# CIFAR, in its true binary format but with few rows


def record_file(path: Path, labels: list[int], *, label_bytes: int, first: int) -> None:
    """Record i shows i in red, i + 1 in green, i + 2 in blue, apart from its first pixel, which is 255."""
    records = []
    for offset, label in enumerate(labels):
        planes = np.repeat(np.arange(3, dtype=np.uint8) + first + offset, 1024)
        planes[0] = 255
        records.append(bytes([19, label][-label_bytes:]) + planes.tobytes())
    path.write_bytes(b"".join(records))


def small_cifar(root: Path, archive: Archive) -> Archive:
    """Writes the extracted folder below `root`."""
    small = dataclasses.replace(archive, train_rows=20, test_rows=6)
    folder = root / archive.folder
    folder.mkdir(parents=True)
    (folder / archive.class_names).write_text("apple\nbear\n\n")
    for number, name in enumerate((*archive.train, archive.test)):
        labels = [index % 2 for index in range(small.rows[name])]
        record_file(folder / name, labels, label_bytes=archive.label_bytes, first=20 * number)
    return small


@pytest.mark.parametrize("archive", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_the_binary_records_of_cifar_are_read(tmp_path, monkeypatch, archive):
    small = small_cifar(tmp_path, archive)
    monkeypatch.setitem(DATASETS, "cifar10", lambda data: cifar(data, small))
    dataset = prepare(settings_for("cifar10", path=str(tmp_path)))
    assert dataset.classes == ("apple", "bear") and dataset.shape == (3, 32, 32)
    assert len(dataset.test) == 6 and len(dataset.train) + len(dataset.validation) == 20 * len(archive.train)
    for split in dataset.splits.values():
        last = split.images[:, :, 31, 31].long()
        assert (last[:, 0] % 2 == split.labels).all()
        assert (last[:, 1:] - last[:, :1] == torch.tensor([1, 2])).all()
        assert (split.images[:, 0, 0, 0] == 255).all() and (split.images[:, 1, 0, 0] == last[:, 1]).all()
    assert set(dataset.test.images[:, 0, 5, 5].tolist()) == set(range(20 * len(archive.train), 20 * len(archive.train) + 6))


def test_cifar_may_be_given_by_its_own_folder_and_resized(tmp_path):
    small = small_cifar(tmp_path, CIFAR10)
    source = cifar(settings_for("cifar10", path=str(tmp_path / CIFAR10.folder), image_size=16, channels=1), small)
    images = source.read(np.array([3, 4])).images
    assert images.shape == (2, 1, 16, 16)
    assert images[:, 0, 9, 9].tolist() == [4, 5]


def pack(root: Path, archive: Archive) -> Archive:
    """Turns the extracted folder into the archive."""
    with tarfile.open(root / archive.name, "w:gz") as tar:
        tar.add(root / archive.folder, archive.folder)
    for path in (root / archive.folder).iterdir():
        path.unlink()
    return dataclasses.replace(archive, md5=hashlib.md5((root / archive.name).read_bytes()).hexdigest())


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def test_an_archive_put_in_place_is_verified_and_extracted_without_network(tmp_path, no_network):
    small = pack(tmp_path, small_cifar(tmp_path, CIFAR10))
    for _ in range(2):
        assert len(cifar(settings_for("cifar10", path=str(tmp_path)), small).labels) == 106
        os.truncate(tmp_path / small.folder / small.test, 5000)  # an extraction that was killed


def test_without_network_the_line_names_the_file_and_where_to_put_it(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "setdefaulttimeout", (timeouts := []).append)
    for name, archive in (("cifar10", "cifar-10-binary.tar.gz"), ("cifar100", "cifar-100-binary.tar.gz")):
        with pytest.raises(UserError, match=rf"Name or service not known\).*{archive} or cifar-\d+-python.tar.gz into data/raw") as error:
            prepare(settings_for(name))
        assert "://" not in str(error.value) and "\n" not in str(error.value)
    assert timeouts == [cifar_module.TIMEOUT, None] * 2


def test_a_damaged_archive_is_not_extracted(tmp_path, no_network):
    small = pack(tmp_path, small_cifar(tmp_path, CIFAR10))
    with (tmp_path / small.name).open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(UserError, match=rf"{small.name} "):
        cifar(settings_for("cifar10", path=str(tmp_path)), small)
    assert not list((tmp_path / small.folder).iterdir())


def test_a_full_disk_during_the_download_is_not_blamed_on_the_network(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", full)
    with pytest.raises(Failure, match=r"No space left on device"):
        prepare(settings_for("cifar10", path=str(tmp_path)))


def test_records_that_are_cut_short_or_mislabelled_are_errors(tmp_path):
    record_file(tmp_path / "x.bin", [0, 7], label_bytes=1, first=0)
    with pytest.raises(UserError, match="label 7 of 5 classes"):
        CIFAR10.read(tmp_path / "x.bin", classes=5)
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        CIFAR10.read(tmp_path / "x.bin", classes=10)


# Statistics


def test_mean_and_standard_deviation_are_those_of_the_training_images(digits):
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert digits.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)


def test_statistics_are_per_channel_and_do_not_depend_on_the_batch():
    images = torch.randint(0, 256, (50, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 4
    images[:, 2] = 255
    assert channel_statistics(images, batch=7) == channel_statistics(images)
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std[:2] == pytest.approx(pixels.std((0, 2, 3), correction=0)[:2].tolist(), abs=1e-12)
    assert std[2] == 1 / 255  # a constant channel can still be divided by


# On disk


def test_what_is_saved_is_loaded_again(tmp_path, digits):
    folder = tmp_path / "data" / "prepared"
    save(digits, folder)
    again = load(folder)
    for name, split in digits.splits.items():
        assert torch.equal(again.splits[name].images, split.images) and torch.equal(again.splits[name].labels, split.labels)
    for field in dataclasses.fields(Dataset):
        if field.name not in digits.splits:
            assert getattr(again, field.name) == getattr(digits, field.name), field.name
    assert sorted(path.name for path in folder.parent.iterdir()) == ["prepared"]


def test_a_dataset_of_an_earlier_version_which_knew_no_remarks_is_loaded(tmp_path, digits):
    save(dataclasses.replace(digits, remarks=("a line",)), tmp_path / "out")
    assert load(tmp_path / "out").remarks == ("a line",)
    path = tmp_path / "out" / "dataset.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "remarks"}))
    assert load(tmp_path / "out").remarks == ()


def test_the_files_are_those_that_others_rely_on(tmp_path):
    dataset = prepare(photos(broken_tree(tmp_path / "p"), skip_corrupt=True, max_train=9))
    save(dataset, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.safetensors",
        "validation.safetensors",
        "test.safetensors",
        "dataset.json",
    }
    train = load_file(tmp_path / "out" / "train.safetensors")
    assert {key: (value.dtype, tuple(value.shape)) for key, value in train.items()} == {
        "images": (torch.uint8, (len(dataset.train), 3, 8, 8)),
        "labels": (torch.int64, (len(dataset.train),)),
    }
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["counts"]["train"] == len(dataset.train) == sum(about["counts_per_class"]["train"].values())
    assert set(about["counts_per_class"]["test"]) == {"a", "b"} == set(about["classes"])
    assert about["skipped"] == list(dataset.skipped) and about["shape"] == [3, 8, 8]
    assert about["digest"] == dataset.digest and about["parameters"]["max_train"] == 9


def test_saving_never_deletes_a_folder_of_something_else(tmp_path, digits):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"also contains holiday\.jpg"):
        save(digits, tmp_path)
    assert (tmp_path / "holiday.jpg").exists()


def test_a_kill_while_saving_leaves_the_old_dataset_and_no_rubbish_later(tmp_path, digits, monkeypatch):
    folder = tmp_path / "out"
    save(digits, folder)
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(*arguments)

    other = prepare(settings_for("digits", max_train=50))
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            save(other, folder)
    assert load(folder).digest == digits.digest
    save(other, folder)
    assert load(folder).digest == other.digest
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_line_and_leaves_the_old_dataset(tmp_path, digits):
    folder = tmp_path / "out"
    save(digits, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # validation fits, train does not
    try:
        with pytest.raises(Failure, match=r"out .*advml prepare"):
            save(prepare(settings_for("digits", seed=1)), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(folder).digest == digits.digest
    assert os.listdir(tmp_path) == ["out"]


def with_tensors(folder: Path, split: str, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / f"{split}.safetensors")), folder / f"{split}.safetensors")


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


FAULTS = {
    "cut short": lambda folder: rewritten(folder / "train.safetensors", lambda content: content[:-100]),
    "one bit": lambda folder: rewritten(folder / "test.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "float images": lambda folder: with_tensors(folder, "validation", lambda one: one | {"images": one["images"].float()}),
    "wrong split": lambda folder: (folder / "validation.safetensors").replace(folder / "test.safetensors"),
    "no labels": lambda folder: with_tensors(folder, "test", lambda one: {"images": one["images"]}),
    "another class name": lambda folder: rewritten(folder / "dataset.json", lambda content: content.replace(b'"0"', b'"zero"')),
    "no dataset.json": lambda folder: (folder / "dataset.json").unlink(),
    "half a dataset.json": lambda folder: (folder / "dataset.json").write_text('{"classes": ['),
    "dataset.json is a list": lambda folder: (folder / "dataset.json").write_text("[]"),
    "no train": lambda folder: (folder / "train.safetensors").unlink(),
    "nothing": shutil.rmtree,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_dataset_is_one_line_with_the_command_that_mends_it(tmp_path, digits, fault):
    save(digits, tmp_path / "out")
    FAULTS[fault](tmp_path / "out")
    with pytest.raises(UserError, match=r"out .*advml prepare$") as error:
        load(tmp_path / "out")
    assert "\n" not in str(error.value)
