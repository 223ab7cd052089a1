"""Images with equal pixels are counted across splits, labels and within a split, recorded, and left out on request."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advml.config import Data
from advml.core.errors import UserError
from advml.data import duplicates
from advml.data.datasets import DATASETS, Dataset, load, prepare, remarks, save
from advml.data.images import Pixels
from advml.data.prepared import SPLITS
from advml.data.splits import Source


def counted(images: np.ndarray, labels: np.ndarray, split: np.ndarray) -> dict:
    """`duplicates.describe`, image by image in plain Python."""
    seen = defaultdict(list)
    for image, label, number in zip(images, labels, split, strict=True):
        seen[image.tobytes()].append((int(label), SPLITS[number]))
    repeated = [group for group in seen.values() if len(group) > 1]
    places = [Counter(name for _, name in group) for group in repeated]
    return {
        "pictures": len(repeated),
        "images": sum(map(len, repeated)),
        "between": {
            f"{one} and {other}": sum(one in place and other in place for place in places) for one, other in combinations(SPLITS, 2)
        },
        "labels": sum(len({label for label, _ in group}) > 1 for group in repeated),
        "within": {name: sum(max(place[name] - 1, 0) for place in places) for name in SPLITS},
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [1, 3, 40])
def test_counts_and_what_stays_are_those_of_a_loop_over_all_images(seed, levels):
    random = np.random.default_rng(seed)
    images = random.integers(0, levels, (60, 1, 1, 2), dtype=np.uint8)
    labels, split = random.integers(0, 3, 60), np.sort(random.integers(0, 3, 60))
    copies = duplicates.find(images, labels=labels, split=split)
    assert duplicates.describe(copies) == counted(images, labels, split)
    expected, of_picture = set(), defaultdict(list)
    for at, image in enumerate(images):
        of_picture[image.tobytes()].append(at)
    for group in of_picture.values():
        if len({labels[at] for at in group}) == 1:
            expected.add(max(group, key=lambda at: (split[at], -at)))  # train 0, validation 1, test 2
    assert set(np.flatnonzero(duplicates.unique(copies)).tolist()) == expected


# A data set whose splits are known: image 0 of train also lies in test, 1 in validation, 2 under another label, 3 twice in train.
SIZES = (12, 6, 6)


def made(monkeypatch, *, repeat: bool = True, **changes) -> Dataset:
    images = np.arange(24 * 16, dtype=np.uint16).astype(np.uint8).reshape(24, 1, 4, 4).copy()
    images[:, 0, 0, 0] = np.arange(24)
    labels = np.arange(24) % 2
    if repeat:
        images[18], images[13], images[5], images[9] = images[0], images[1], images[2], images[3]
    starts = np.cumsum((0, *SIZES))
    given = {name: np.arange(*starts[number : number + 2]) for number, name in enumerate(SPLITS)}
    monkeypatch.setitem(DATASETS, "digits", lambda data: Source("made", ("a", "b"), labels, lambda chosen: Pixels(images[chosen]), given))
    return prepare(Data(**{"name": "digits", "validation": 0.1, "test": 0.2, **changes}))


def numbers(dataset: Dataset, split: str) -> list[int]:
    """Which image (by its first pixel) stands where."""
    return sorted(dataset.splits[split].images[:, 0, 0, 0].tolist())


def test_copies_are_kept_counted_and_recorded_unless_told_otherwise(monkeypatch, tmp_path):
    dataset = made(monkeypatch)
    assert [len(split) for split in dataset.splits.values()] == list(SIZES)
    assert dataset.duplicates["pictures"] == 4 and dataset.duplicates["images"] == 8
    assert dataset.duplicates["between"] == {"train and validation": 1, "train and test": 1, "validation and test": 0}
    assert dataset.duplicates["labels"] == 1 and dataset.duplicates["within"] == {"train": 2, "validation": 0, "test": 0}
    assert dataset.duplicates["dropped"] == dict.fromkeys(SPLITS, 0)
    save(dataset, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["duplicates"] == dataset.duplicates
    assert load(tmp_path / "out").duplicates == dataset.duplicates


def test_examples_name_every_copy_and_the_contradictory_ones_come_first(monkeypatch):
    first, *others = made(monkeypatch).duplicates["examples"]
    assert {(one["image"], one["class"]) for one in first} == {("image 2", "a"), ("image 5", "b")}
    assert len(others) == 3 and {one["split"] for one in others[2]} == {"train"}


def test_dropping_keeps_test_whole_and_takes_both_of_a_contradiction(monkeypatch):
    dataset = made(monkeypatch, duplicates="drop")
    assert numbers(dataset, "test") == [0, 19, 20, 21, 22, 23]
    assert numbers(dataset, "validation") == [1, 12, 14, 15, 16, 17]
    assert numbers(dataset, "train") == [3, 4, 6, 7, 8, 10, 11]
    assert dataset.duplicates["dropped"] == {"train": 5, "validation": 0, "test": 0}
    labels = dict(zip(dataset.train.images[:, 0, 0, 0].tolist(), dataset.train.labels.tolist(), strict=True))
    assert all(label == number % 2 for number, label in labels.items())


def test_dropping_changes_nothing_where_there_is_nothing_to_drop(monkeypatch):
    kept, dropped = (made(monkeypatch, repeat=False, duplicates=way) for way in ("keep", "drop"))
    assert kept.digest == dropped.digest and kept.duplicates == dropped.duplicates
    assert kept.duplicates["pictures"] == 0 and remarks(kept) == []


def test_the_digits_have_no_identical_images():
    assert prepare(Data(name="digits", validation=0.1, test=0.2)).duplicates["pictures"] == 0


def test_the_sentence_has_the_counts_an_example_and_the_remedy(monkeypatch):
    (kept,), (dropped,) = remarks(made(monkeypatch)), remarks(made(monkeypatch, duplicates="drop"))
    for part in ("4 pictures", "8 identical", "1 in both train and test", "1 with more than one label", "2 surplus in train"):
        assert part in kept and part in dropped
    assert "data.duplicates=drop" in kept and "5 from train" in dropped and "data.duplicates" not in dropped
    assert "image 2" in kept and "\n" not in kept


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)


def test_pixels_count_not_files(tmp_path):
    for number in range(8):
        for label in ("a", "b"):
            photo(tmp_path / label / f"{number}.png", number + 100 * (label == "b"))
    Image.open(tmp_path / "a" / "0.png").save(tmp_path / "b" / "copy.bmp")
    dataset = prepare(Data(name="folder", path=str(tmp_path), image_size=8, channels=1, validation=0.1, test=0.2))
    assert dataset.duplicates["pictures"] == dataset.duplicates["labels"] == 1
    assert {one["image"] for one in dataset.duplicates["examples"][0]} == {"a/0.png", "b/copy.bmp"}


def test_a_class_of_copies_alone_is_an_error_once_they_are_dropped(tmp_path):
    for number in range(8):
        photo(tmp_path / "a" / f"{number}.png", number)
        photo(tmp_path / "b" / f"{number}.png", 99)
    data = Data(name="folder", path=str(tmp_path), image_size=8, validation=0.1, test=0.2, duplicates="drop")
    with pytest.raises(UserError, match="class 'b' has no image left in train"):
        prepare(data)


def test_a_data_set_without_a_readable_image_is_an_error(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(4):
            (tmp_path / label / f"{number}.png").touch()
    with pytest.raises(UserError, match="class 'a' has no image left in train"):
        prepare(Data(name="folder", path=str(tmp_path), image_size=8, validation=0.1, test=0.2, skip_corrupt=True))


def test_an_odd_file_name_leaves_the_sentence_one_line_of_text(tmp_path):
    for number in range(8):
        for label in ("a", "b"):
            photo(tmp_path / label / f"{number}\n\x1b[31m\udcff.png", number)
    (said,) = remarks(prepare(Data(name="folder", path=str(tmp_path), image_size=8, validation=0.1, test=0.2)))
    assert said.isprintable() and said.encode()


def test_an_older_prepared_data_set_is_read_and_says_nothing_of_copies(monkeypatch, tmp_path):
    save(made(monkeypatch), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    del about["duplicates"], about["depth"], about["parameters"]["duplicates"], about["parameters"]["white_level"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(about))
    assert remarks(load(tmp_path / "out")) == []
