"""Training images without labels: those beyond the label budget, those of a folder `unlabelled`, and folders without any class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advml.config import Data
from advml.core.errors import UserError
from advml.data.datasets import load, prepare, remarks, save
from advml.data.duplicates import treat
from advml.data.image_folder import fingerprint
from advml.data.prepared import digest
from advml.data.splits import Rows, Source

DIGITS = {"name": "digits", "validation": 0.1, "test": 0.2, "max_train": 200}


def images_of(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def prepared(budget: float, **changes):
    return prepare(Data(**DIGITS | {"label_budget": budget} | changes))


def test_a_label_budget_is_stratified_seeded_and_a_subset_of_every_larger_one():
    whole, half, few, other = prepared(1.0), prepared(0.5), prepared(0.1), prepared(0.1, seed=1)
    assert whole.unlabelled is None and set(whole.splits) == {"train", "validation", "test"}
    for part, share in ((half, 0.5), (few, 0.1)):
        assert len(part.train) == share * len(whole.train) and len(part.train) + len(part.unlabelled) == len(whole.train)
        counts = torch.bincount(part.train.labels, minlength=10)
        expected = share * torch.bincount(whole.train.labels, minlength=10)
        assert (counts - expected).abs().max() <= 1
        assert images_of(part.train) | images_of(part.unlabelled) == images_of(whole.train)
        assert all(torch.equal(part.splits[name].images, whole.splits[name].images) for name in ("validation", "test"))
        assert (part.mean, part.std) == (whole.mean, whole.std)  # labels are no part of it
    assert images_of(few.train) < images_of(half.train) and images_of(few.train) != images_of(other.train)
    assert len({one.digest for one in (whole, half, few)}) == 3
    assert torch.equal(prepared(0.1).train.images, few.train.images)


def test_a_dataset_with_unlabelled_images_is_saved_and_loaded_and_its_digest_covers_them(tmp_path):
    few = prepared(0.1)
    save(few, tmp_path / "prepared")
    again = load(tmp_path / "prepared")
    assert again.digest == few.digest and torch.equal(again.unlabelled.images, few.unlabelled.images)
    assert torch.equal(again.unlabelled.labels, few.unlabelled.labels) and "20 training images are labelled; 180" in remarks(again)[0]
    assert digest({**few.splits, "unlabelled": few.train}, few.classes) != few.digest
    save(prepared(1.0), tmp_path / "prepared")  # replaces it, the file of the unlabelled included
    assert load(tmp_path / "prepared").unlabelled is None


def test_a_budget_of_fewer_images_than_classes_is_refused_with_the_least_one():
    with pytest.raises(UserError, match=r"data\.label_budget = 0\.02 .* 0\.05"):
        prepared(0.02)


def draw(root: Path, folders: dict[str, int]) -> Path:
    """So many different images in each folder, and in the last one a copy of the first image of all."""
    random, first = np.random.default_rng(0), None
    for name, count in folders.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            first = pixels if first is None else first
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    Image.fromarray(first).save(root / name / "copy.png")
    return root


def of_folder(root: Path, **changes) -> Data:
    return Data(name="folder", path=str(root), image_size=8, validation=0.2, test=0.2, **changes)


TREE = {"train/cats": 6, "train/dogs": 6, "unlabelled": 5}


def test_a_folder_of_unlabelled_images_is_left_out_or_read_beside_the_rest_of_a_budget(tmp_path):
    root = draw(tmp_path / "photos", TREE)
    plain, pool, both = (prepare(of_folder(root, **one)) for one in ({}, {"unlabelled": True}, {"unlabelled": True, "label_budget": 0.5}))
    assert plain.unlabelled is None and any("unlabelled is not a split, and is left out" in line for line in plain.remarks)
    assert pool.unlabelled.labels.tolist() == [-1] * 6 and pool.ignored == 0
    assert all(torch.equal(pool.splits[name].images, split.images) for name, split in plain.splits.items())
    assert len(both.train) == len(plain.train) / 2 and sorted(both.unlabelled.labels.tolist())[:6] == [-1] * 6
    assert len(both.unlabelled) == 6 + len(plain.train) / 2
    before = fingerprint(of_folder(root, unlabelled=True))
    (root / "unlabelled" / "0.png").unlink()
    assert fingerprint(of_folder(root, unlabelled=True)) != before


def test_an_unlabelled_copy_of_a_labelled_image_contradicts_nothing_and_is_the_one_that_goes(tmp_path):
    root = draw(tmp_path / "photos", TREE)
    kept, dropped = (prepare(of_folder(root, unlabelled=True, duplicates=what)) for what in ("keep", "drop"))
    assert kept.duplicates["pictures"] == 1 and kept.duplicates["labels"] == 0
    assert {one["class"] for one in kept.duplicates["examples"][0]} == {"cats", None}
    assert dropped.duplicates["dropped"] == {"train": 0, "validation": 0, "test": 0, "unlabelled": 1}
    assert len(dropped.unlabelled) == len(kept.unlabelled) - 1 and len(dropped.train) == len(kept.train)


def test_what_images_beyond_the_budget_are_labelled_contradicts_nothing():
    """A picture twice, in train and beyond the budget, under another label there, which is not read."""
    rows = Rows(np.zeros((2, 1, 4, 4), np.uint8), np.arange(2), np.array([0, 3]))
    kept, found = treat(rows, Source("made", ("a", "b"), np.array([0, 1]), read=None), drop=True)
    assert found["labels"] == 0 and [one["class"] for one in found["examples"][0]] == ["a", None] and len(kept.images) == 1


def test_a_flat_folder_has_images_to_learn_from_and_to_select_on_but_no_class(tmp_path):
    root = draw(tmp_path / "flat", {".": 9})
    with pytest.raises(UserError, match=r"data\.unlabelled=true"):
        prepare(of_folder(root))
    flat = prepare(of_folder(root, unlabelled=True))
    assert flat.classes == () and [len(split) for split in flat.splits.values()] == [6, 2, 2]
    assert all((split.labels == -1).all() for split in flat.splits.values()) and flat.unlabelled is None
    save(flat, tmp_path / "prepared")
    assert load(tmp_path / "prepared").digest == flat.digest and "no image has a label" in remarks(flat)[0]
    with pytest.raises(UserError, match=r"data\.label_budget = 0\.5 has no effect"):
        prepare(of_folder(root, unlabelled=True, label_budget=0.5))


def test_asking_for_unlabelled_images_where_there_are_none_is_refused(tmp_path):
    root = draw(tmp_path / "photos", {"cats": 3, "dogs": 3})
    with pytest.raises(UserError, match=r"data\.unlabelled = true, but .*photos"):
        prepare(of_folder(root, unlabelled=True))
    with pytest.raises(ValueError, match=r"data\.unlabelled = true has no effect"):
        Data(**DIGITS | {"unlabelled": True})
