"""Image folders: splits and classes, labels in text files, clutter, links, fingerprints. What is read, said, refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from advml.config import Data
from advml.core.errors import UserError
from advml.data import folder_tree as tree_module
from advml.data.folder_tree import is_clutter
from advml.data.image_folder import fingerprint, folder
from advml.data.labels import read_labels
from advml.data.splits import Source


def plant(root: Path, *specs: str) -> Path:
    """`train/cats=3` makes three empty files train/cats/0.png .. 2.png; `a.txt` one empty file."""
    for spec in specs:
        place, _, count = spec.partition("=")
        if count:
            (root / place).mkdir(parents=True, exist_ok=True)
            for number in range(int(count)):
                (root / place / f"{number}.png").touch()
        else:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).touch()
    return root


def settings(root: Path | str, **changes) -> Data:
    return Data(**{"name": "folder", "path": str(root), "image_size": 8, "validation": 0.1, "test": 0.2, **changes})


def read(root: Path, **changes) -> Source:
    return folder(settings(root, **changes))


def counts(source: Source) -> dict[str, list[int]]:
    """Images of each class in each split that the tree comes with."""
    return {split: np.bincount(source.labels[indices], minlength=len(source.classes)).tolist() for split, indices in source.given.items()}


# Splits and classes


SPLIT = {  # tree -> images per class (cats, dogs) in each split
    "other words": (("Training/cats=3", "Training/dogs=4", "Testing/cats=1", "Testing/dogs=2"), {"train": [3, 4], "test": [1, 2]}),
    "three splits": (
        ("train_set/cats=3", "train_set/dogs=4", "DEV/cats=1", "DEV/dogs=1", "hold-out/cats=1", "hold-out/dogs=2"),
        {"train": [3, 4], "validation": [1, 1], "test": [1, 2]},
    ),
    "no test": (("train/cats=3", "train/dogs=4", "valid/cats=1", "valid/dogs=2"), {"train": [3, 4], "validation": [1, 2]}),
    "only train": (("Train/cats=3", "Train/dogs=4"), {"train": [3, 4]}),
    "a common prefix": (("pet_train/cats=3", "pet_train/dogs=4", "pet_test/cats=1", "pet_test/dogs=2"), {"train": [3, 4], "test": [1, 2]}),
    "wrapped": (("x/y/train/cats=3", "x/y/train/dogs=4", "x/y/test/cats=1", "x/y/test/dogs=2"), {"train": [3, 4], "test": [1, 2]}),
    "each wrapped": (
        ("train/train/cats=3", "train/train/dogs=4", "test/test/cats=1", "test/test/dogs=2"),
        {"train": [3, 4], "test": [1, 2]},
    ),
    "wrapped classes": (("pets/cats=3", "pets/dogs=4"), {"train": [3, 4]}),
    "a folder for the images": (("cats/images=3", "dogs/images=4", "cats/boxes.txt", "dogs/boxes.txt"), {"train": [3, 4]}),
    "parts that differ": (("cats/2019=1", "cats/2020=2", "dogs/indoors=4"), {"train": [3, 4]}),
    "unlabelled beside": (("train/cats=3", "train/dogs=4", "pred=9", "docs/a.txt"), {"train": [3, 4]}),
    "test without labels": (("train/cats=3", "train/dogs=4", "test=9"), {"train": [3, 4]}),
    "the same wrapped": (("train/cats=3", "train/dogs=4", "test/unknown=9"), {"train": [3, 4]}),
}


@pytest.mark.parametrize("tree", SPLIT)
def test_splits_are_recognised_under_their_usual_names_and_in_wrappers(tmp_path, tree):
    specs, expected = SPLIT[tree]
    source = read(plant(tmp_path / "p", *specs))
    assert source.classes == ("cats", "dogs") and counts(source) == expected


DOUBTFUL = {  # tree -> a part of the line
    "splits under unknown names": (("one/cats=3", "one/dogs=3", "two/cats=3", "two/dogs=3"), "data.layout=classes"),
    "groups, one class in common": (("one/cats=3", "one/dogs=3", "two/cats=3"), "data.layout=classes"),
    "groups, in other capitals": (("one/cats=3", "one/dogs=3", "two/Cats=3", "two/owls=3"), "data.layout=classes"),
    "groups, deeper": (("one/a/cats=3", "one/a/dogs=3", "two/b/cats=3"), "data.layout=classes"),
    "groups in splits": (("train/one/cats=3", "train/one/dogs=3", "train/two/cats=3", "train/two/dogs=3"), "data.layout=splits"),
    "masks beside the images": (("a=3", "a/masks=3", "b=3", "b/masks=3"), "data.layout=classes"),
    "thumbnails beside some images": (("a/thumbs=3", "b=3", "b/Thumbs=3"), "b/Thumbs seems to contain"),
    "masks in one class": (("cats=3", "cats/masks=3", "dogs=3"), "cats/masks seems to contain masks"),
    "masks by name": (("cats/1.png", "cats/1_mask.png", "cats/2.png", "dogs=3"), "cats/1_mask.png seems to be a mask"),
    "several masks of an image": (("a/b (1).png", "a/b (1)_mask_1.png", "a/b (1)_mask_2.png", "c=2"), "like 2 of 3 images"),
    "annotations in a split": (("train/a/1.jpg", "train/a/1-gt.png", "train/b=3", "test/a=1", "test/b=1"), "data.layout=splits"),
    "masks as a class": (("images=3", "masks=3"), "masks seems to contain masks"),
    "segmentations as a class": (("JPEGImages=3", "SegmentationClass=3", "SegmentationObject=3"), "seems to contain masks"),
    "masks in splits": (("train/a=3", "train/a/masks=3", "train/b=3", "train/b/masks=3"), "data.layout=splits"),
    "a split of each class": (("cats/train=3", "cats/test=1", "dogs/train=3", "dogs/test=1"), "data.layout=classes"),
    "splits in one of several": (("pets/train/cats=3", "pets/test/cats=3", "others=4"), "give it alone as data.path"),
    "splits of each class side by side": (("cats_train=3", "cats_test=3", "dogs_train=3", "dogs_test=3"), "both names for test"),
    "two words for a split": (
        ("train/cats=3", "train/dogs=3", "eval/cats=3", "eval/dogs=1", "test/cats=3", "test/dogs=1"),
        "both names for test",
    ),
    "no training split": (("Testing/cats=3", "Testing/dogs=3", "val/cats=1", "val/dogs=1"), "no 'train' folder"),
    "a class beside splits": (("Training/cats=3", "Training/dogs=3", "owls=3"), "contains 'owls' beside Training"),
    "one split twice": (("train_images=3", "train_photos=3"), "both names for train"),
    "flat test images beside classes": (("cats=3", "dogs=3", "test=3"), "contains 'test', a name for test images, beside 'cats'"),
    "flat validation images beside classes": (("cats=3", "seg_train=3", "Val=3"), "data.layout=classes"),
    "unlabelled images beside classes": (("train=3", "predictions=2", "bus=4"), "beside 'bus'"),
    "flat splits": (("train=3", "test=3"), "data.layout=classes"),
    "flat validation": (("train/cats=3", "train/dogs=4", "val=3"), "val/labels.csv"),
    "a class in one spelling": (("train/cats=3", "train/dogs=3", "test/Cats=3", "test/dogs=3"), "class 'Cats' is in"),
    "names that differ in spaces": (("Cats=3", "cats=3", "cats =3"), "differ only in spaces"),
    "a name that cannot be printed": (("cats=3", "do\x1b[31mgs=3"), "control characters"),
    "flat": (("=5",), "labels.csv"),
    "flat in a folder": (("images=5", "readme.md"), "labels.csv"),
}


@pytest.mark.parametrize("tree", DOUBTFUL)
def test_what_is_doubtful_is_refused_in_a_line_with_the_remedy(tmp_path, tree):
    specs, part = DOUBTFUL[tree]
    with pytest.raises(UserError) as error:
        read(plant(tmp_path / "p", *specs))
    assert part in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "specs",
    [
        ("with_mask/1_mask.png", "with_mask/2_mask.png", "without_mask/1.png", "without_mask/2.png"),  # faces
        ("mask=2", "no_mask=2"),
        ("edges=2", "boxes=2", "labels=2"),
        ("cats/a_label.png", "cats/label.png", "dogs/1.png"),
    ],
)
def test_classes_and_files_with_such_words_alone_are_no_masks(tmp_path, specs):
    assert len(read(plant(tmp_path / "p", *specs)).classes) == len({spec.partition("/")[0] for spec in specs})


def test_masks_are_images_where_data_layout_says_so(tmp_path):
    source = read(plant(tmp_path / "p", "cats/1.png", "cats/1_mask.png", "dogs/masks=2", "dogs=1"), layout="classes")
    assert counts(source) == {"train": [2, 3]}


def test_images_are_numbered_by_folder_and_file_name_on_which_the_division_depends(tmp_path):
    source = read(plant(tmp_path / "p", "train/cats=1", "train/dogs=2", "dev/cats=1", "dev/dogs=1", "test/cats=1", "test/dogs=1"))
    assert {split: indices.tolist() for split, indices in source.given.items()} == {
        "validation": [0, 1],
        "test": [2, 3],
        "train": [4, 5, 6],
    }
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 1]


def test_data_layout_says_that_top_folders_are_classes_whatever_they_are_called_and_hold(tmp_path):
    root = plant(tmp_path / "p", "Train/a=3", "Train/b=1", "Test/a=3", "Bus/b=5")
    assert read(root, layout="classes").classes == ("Bus", "Test", "Train")
    with pytest.raises(UserError):
        read(root, layout="splits")


def test_data_layout_says_that_top_folders_are_splits_whatever_the_classes_hold(tmp_path):
    root = plant(tmp_path / "p", "box/train/cats/a=3", "box/train/cats/b=1", "box/train/dogs/a=3", "box/train/dogs/b=3")
    assert counts(read(root, layout="splits")) == {"train": [4, 6]}
    with pytest.raises(UserError, match=r"data\.layout = 'splits'"):
        read(plant(tmp_path / "q", "cats=3", "dogs=3"), layout="splits")


def test_a_class_may_be_called_train_where_its_images_lie_in_it_and_that_is_said(tmp_path):
    root = plant(tmp_path / "p", "train=3", "car=2", "bus=4")
    source = read(root)
    assert source.classes == ("bus", "car", "train") and counts(source) == {"train": [4, 2, 3]}
    (line,) = source.remarks
    assert "train is read as a class" in line and "data.layout=classes" in line
    assert read(root, layout="classes").remarks == ()
    assert read(plant(root, "test=1"), layout="classes").classes == ("bus", "car", "test", "train")


def test_classes_in_different_unicode_forms_are_one_class_also_across_splits(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = plant(tmp_path / "p", f"train/{composed}=3", "train/zebra=2", f"test/{decomposed}=1", "test/zebra=1")
    source = read(root)
    assert source.classes == (composed, "zebra") and counts(source) == {"train": [3, 2], "test": [1, 1]}
    both = read(plant(tmp_path / "q", f"{composed}=3", f"{decomposed}=2", "zebra=1"))
    assert counts(both) == {"train": [5, 1]} and any("Unicode" in line for line in both.remarks)


def said(source) -> str:
    return "\n".join(source.remarks)


def test_what_a_user_may_not_expect_is_said(tmp_path):
    source = read(plant(tmp_path / "p", "box/Training/cats=3", "box/Training/dogs=4", "box/Testing/scans=9", "box/docs/a.txt"))
    for part in ("box is read", "train = Training", "test: a share of train", "docs is not a split", "9 images in", "no labels"):
        assert part in said(source)
    assert source.ignored == 10
    assert read(plant(tmp_path / "q", "cats=3", "dogs=4")).remarks == ()


def test_names_that_differ_in_capitals_only_are_said_and_kept(tmp_path):
    source = read(plant(tmp_path / "p", "a=3", "A=4"))
    assert source.classes == ("A", "a") and counts(source) == {"train": [4, 3]}
    assert "'A' and 'a' differ only in capitals" in said(source)


def test_numbers_keep_their_order_as_text_and_the_labels_are_said(tmp_path):
    source = read(plant(tmp_path / "p", *(f"{number}=1" for number in range(1, 13))))
    assert source.classes == tuple(sorted(str(number) for number in range(1, 13)))
    (line,) = source.remarks
    assert "0 -> 1, 1 -> 10, 2 -> 11, 3 -> 12, 4 -> 2" in line
    assert read(plant(tmp_path / "q", "1=1", "2=1", "3=1")).remarks == ()


def test_loose_images_beside_classes_are_counted_and_said(tmp_path):
    source = read(plant(tmp_path / "p", "=3", "cats=2", "dogs=2", "notes.txt"))
    assert source.ignored == 4 and "3 images in" in said(source)


# Links


def test_a_class_that_is_a_link_to_nowhere_is_not_left_out_silently(tmp_path):
    root = plant(tmp_path / "p", "cats=2", "dogs=2")
    (root / "owls").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="owls is a link"):
        read(root)
    (root / "owls").rename(root / "dogs" / "more")
    source = read(root)
    chosen = source.given["train"]
    assert "dogs/more" in {source.title(chosen[position]) for position in source.read(chosen).unreadable}


@pytest.mark.parametrize(
    ("link", "target"), [("cats/up", ""), ("cats/friends", "dogs"), ("owls", "dogs"), ("dogs/2019/all", "cats")], ids=str
)
def test_no_image_comes_into_two_classes_by_a_link(tmp_path, link, target):
    root = plant(tmp_path / "p", "cats=2", "dogs/2019=2")
    (root / link).symlink_to(root / target)
    with pytest.raises(UserError, match="are the same folder"):
        read(root)


def test_no_image_comes_into_two_splits_by_a_link(tmp_path):
    root = plant(tmp_path / "p", "train/cats=2", "train/dogs=2")
    (root / "test").symlink_to(root / "train")
    with pytest.raises(UserError, match="are the same folder"):
        read(root)


def test_links_within_a_class_count_once_and_to_elsewhere_are_followed(tmp_path):
    root = plant(tmp_path / "p", "cats/a=2", "dogs=2")
    (root / "cats" / "again").symlink_to(root / "cats" / "a")
    (root / "cats" / "circle").symlink_to(root / "cats")
    (root / "dogs" / "more").symlink_to(plant(tmp_path / "elsewhere", "=5"))
    assert counts(read(root)) == {"train": [2, 7]}


# Labels in a text file


def tiny_imagenet(root: Path) -> Path:
    """Tiny-ImageNet's true layout, with two classes: boxes, wnids.txt, words.txt and an unlabelled test split included."""
    wnids = ("n03444034", "n01443537")
    for wnid in wnids:
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        for number in range(4):
            (images / f"{wnid}_{number}.JPEG").touch()
        lines = [f"{wnid}_{number}.JPEG\t0\t10\t63\t58\n" for number in range(4)]
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(lines))
    for split, count in (("val", 3), ("test", 5)):
        (root / split / "images").mkdir(parents=True)
        for number in range(count):
            (root / split / "images" / f"{split}_{number}.JPEG").touch()
    lines = [f"val_{number}.JPEG\t{wnids[number % 2]}\t0\t32\t44\t62\n" for number in range(3)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text("n03444034\tgo-kart\nn01443537\tgoldfish, Carassius auratus\n")
    return root


def test_tiny_imagenet_is_read_as_it_comes(tmp_path):
    source = read(tiny_imagenet(tmp_path / "tiny-imagenet-200"))
    assert source.classes == ("n01443537", "n03444034")
    assert counts(source) == {"train": [4, 4], "validation": [1, 2]}
    assert any("val_annotations.txt" in line for line in source.remarks)
    assert any("5 images" in line and "no labels" in line for line in source.remarks)
    assert source.ignored == 5 + 2 + 1 + 2  # test images, boxes, annotations, wnids and words


FILES = {
    "tabs": "0.png\tcats\n1.png\tdogs\n2.png\tcats\n",
    "boxes and a header": "filename,width,height,class,xmin\n0.png,500,640,cats,1\n1.png,500,640,dogs,2\n2.png,640,500,cats,3\n",
    "a header in other letters": "Path, Split, Class_Name\n0.png, a, cats\n1.png, a, dogs\n2.png, b, cats\n",
    "empty columns at the end": "0.png,cats,,\n1.png,dogs,,\n2.png,cats,\n",
    "commas and a header": "file,label\n0.png,cats\n2.png,cats\n1.png,dogs\n",
    "a byte order mark, Windows line ends, empty lines": "\ufefffile;label\r\n\r\n0.png;cats\r\n2.png;cats\r\n1.png;dogs\r\n",
    "spaces": "0.png cats\n1.png dogs\n2.png cats",
    "paths": "images/0.png,cats\nimages/1.png, dogs \nimages/2.png,cats\n",
    "quotes": '"0.png","cats"\n"1.png","dogs"\n"2.png","cats"\n',
    "a line twice": "0.png,cats\n0.png,cats\n1.png,dogs\n2.png,cats\n",
}


@pytest.mark.parametrize("form", FILES)
def test_a_flat_folder_with_a_text_file_of_labels_is_read(tmp_path, form):
    root = plant(tmp_path / "p", "images=3")
    (root / "labels.csv").write_text(FILES[form], newline="")
    (root / "readme.txt").write_text("three images of cats and dogs\n")
    source = read(root)
    assert source.classes == ("cats", "dogs")
    assert source.labels.tolist() == [0, 0, 1] and counts(source) == {"train": [2, 1]}


def test_blanks_belong_to_the_class_and_the_classes_that_were_read_are_said(tmp_path):
    root = plant(tmp_path / "p", "=3")
    (root / "labels.txt").write_text('0.png new york\n1.png new york\n2.png "san jose"\n')
    source = read(root)
    assert source.classes == ("new york", "san jose") and source.labels.tolist() == [0, 0, 1]
    assert "2 classes (new york, san jose)" in said(source)


WRONG = {
    "a missing line": ("0.png,cats\n1.png,dogs\n", "lacks 1 of 3 images, e.g. '2.png'"),
    "an image that is not there": ("0.png,cats\n1.png,dogs\n2.png,cats\n3.png,cats\n", "names '3.png'"),
    "no class": ("0.png,cats\n1.png,dogs\n2.png\n", "'2.png' no class"),
    "an empty class": ("0.png,cats\n1.png,dogs\n2.png, \n", "'2.png' no class"),
    "two classes": ("0.png,cats\n1.png,dogs\n2.png,cats\n0.png,dogs\n", "'0.png' two classes"),
    "0 and 1 in a column of each class": (
        "filename, cats, dogs\n0.png,1,0\n1.png,0,1\n2.png,1,0\n",
        "columns (filename, cats, dogs), and none",
    ),
    "a box before the class": ("0.png,1,2,3,4,cats\n1.png,1,2,3,4,dogs\n2.png,1,2,3,4,cats\n", "'FILE,LABEL'"),
    "a box before a number": ("0.png\t1\t2\t3\t4\t0\n1.png\t1\t2\t3\t4\t1\n2.png\t1\t2\t3\t4\t0\n", "'FILE,LABEL'"),
    "two columns of classes": ("file,label,category\n0.png,0,cats\n1.png,1,dogs\n2.png,0,cats\n", "2 of them"),
    "a class with a comma": ("0.png,cats\n1.png,dogs, wild\n2.png,cats\n", "has 3 columns"),
    "one class": ("0.png,cats\n1.png,cats\n2.png,cats\n", "only one class"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_does_not_label_every_image_once_is_refused(tmp_path, fault):
    text, part = WRONG[fault]
    root = plant(tmp_path / "p", "=3")
    (root / "labels.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read(root)
    assert part in str(error.value) and "p" in str(error.value)


def test_a_list_of_classes_by_number_is_no_list_of_images_by_number(tmp_path):
    root = plant(tmp_path / "p", "=3")
    (root / "classes.txt").write_text("0 cats\n1 dogs\n")
    (root / "labels.csv").write_text("0.png,0\n1.png,1\n2.png,0\n")
    assert read(root).classes == ("0", "1")


def test_two_files_that_name_the_images_are_refused(tmp_path):
    root = plant(tmp_path / "p", "=2")
    for name in ("old.csv", "new.csv"):
        (root / name).write_text("0.png,cats\n1.png,dogs\n")
    with pytest.raises(UserError, match=r"new\.csv and old\.csv both name"):
        read(root)


BOTH = {"train": [1, 1], "test": [1, 1]}
BESIDE = {  # folders, text files beside them -> images of cats and dogs in each split
    "one file for all": (
        ("train=2", "test=2"),
        {"labels.csv": "train/0.png,cats\ntrain/1.png,dogs\ntest/0.png,cats\ntest/1.png,dogs\n"},
        BOTH,
    ),
    "a file a split": (
        ("train=2", "test=2"),
        {"train.csv": "id,label\n0,cats\n1,dogs\n", "test_labels.csv": "id,label\n0.png,cats\n1.png,dogs\n"},
        BOTH,
    ),
    "no labels of test": (
        ("train=2", "test/7.png"),
        {"labels.csv": "id,breed\n0,cats\n1,dogs\n", "sample_submission.csv": "id,cats,dogs\n7,0.5,0.5\n"},
        {"train": [1, 1]},
    ),
    "a list of test images": (
        ("train=2", "test=1"),
        {"Training_set.csv": "filename,label\n0.png,cats\n1.png,dogs\n", "Testing_set.csv": "filename\n0.png\n"},
        {"train": [1, 1]},
    ),
    "only train": (("box/train=2",), {"box/train_labels.txt": "0.png cats\n1.png dogs\n"}, {"train": [1, 1]}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_labels_of_splits_may_stand_beside_them(tmp_path, case):
    specs, tables, expected = BESIDE[case]
    root = plant(tmp_path / "p", *specs)
    for name, text in tables.items():
        (root / name).write_text(text)
    assert counts(read(root)) == expected


def test_a_name_that_two_splits_have_is_not_guessed(tmp_path):
    root = plant(tmp_path / "p", "train=2", "test=2")
    (root / "labels.csv").write_text("0.png,cats\n1.png,dogs\n")
    with pytest.raises(UserError, match=r"labels\.csv"):
        read(root)


def test_a_name_that_two_images_have_must_come_with_its_folder(tmp_path):
    root = plant(tmp_path / "p", "a=1", "b=1")
    table, images = root / "labels.csv", [root / "a" / "0.png", root / "b" / "0.png"]
    table.write_text("a/0.png,cats\nb/0.png,dogs\n")
    assert read_labels([table], images) == (table, {"cats": images[:1], "dogs": images[1:]})
    table.write_text("a/0.png,cats\n0.png,dogs\n")
    with pytest.raises(UserError, match=r"names '0\.png'"):
        read_labels([table], images)


def test_labels_of_other_classes_than_the_training_split_has_are_refused(tmp_path):
    root = plant(tmp_path / "p", "train/cats=2", "train/dogs=2", "val=2")
    (root / "val" / "labels.txt").write_text("0.png 1\n1.png 0\n")
    with pytest.raises(UserError, match=r"class '0' is in .*val but not in .*train"):
        read(root)


def test_text_files_of_other_kinds_are_no_labels(tmp_path):
    root = plant(tmp_path / "p", "=2")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "long.csv").write_text(f"0.png,{'x' * 200_000}\n")
    with pytest.raises(UserError, match="no class folders"):
        read(root)
    assert settings(root).layout == "auto"


# Clutter


FOLDERS = (
    "@eaDir",
    "$Recycle.Bin",
    "System Volume Information",
    "__MACOSX",
    ".ipynb_checkpoints",
    "lost+found",
    ".Trash-1000",
    ".thumbnails",
)
FOLDERS += ("#recycle", "RECYCLER", ".git", "@Recycle", "__pycache__")


@pytest.mark.parametrize("name", FOLDERS)
def test_clutter_is_left_out_at_every_depth_and_said(tmp_path, name):
    plain = ("train/cats=3", "train/dogs/deep=2", "test/cats=1", "test/dogs=1")
    places = ("", "train/", "train/cats/", "train/dogs/deep/", "test/")
    source = read(plant(tmp_path / "p", *plain, *(f"{place}{name}=4" for place in places), *(f"{place}{name}/cats=4" for place in places)))
    assert source.classes == ("cats", "dogs") and counts(source) == {"train": [3, 2], "test": [1, 1]}
    assert any(f"{name} (5)" in line for line in source.remarks)


def test_files_of_systems_are_no_images_whatever_their_suffix(tmp_path):
    source = read(
        plant(tmp_path / "p", "cats=3", "dogs=2", "cats/._0.png", "cats/Thumbs.db", "dogs/desktop.ini", "dogs/.hidden.png", ".DS_Store")
    )
    assert counts(source) == {"train": [3, 2]} and source.ignored == 5


def test_pictures_of_formats_that_are_not_read_are_counted_and_said(tmp_path):
    source = read(plant(tmp_path / "p", "cats=3", "dogs=2", "cats/1.DNG", "cats/2.dng", "dogs/deep/a.npy", "dogs/notes.md", "cats/x.jpe"))
    assert counts(source) == {"train": [4, 2]} and source.ignored == 4
    files, line = source.remarks
    assert "dogs/notes.md" in files and ".npy" not in files
    assert "2 .dng, 1 .npy;" in line
    with pytest.raises(UserError, match=r"cats .*no images.* convert 2 \.cr2"):
        read(plant(tmp_path / "q", "cats/1.CR2", "cats/2.cr2", "dogs=2"))


@pytest.mark.parametrize("name", ["thumbs", "recycled", "recycle", "@home", "#1", "trash", "lost", "system"])
def test_a_class_may_have_a_name_that_resembles_clutter(name):
    assert not is_clutter(name)


# Fingerprints


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("trouble", ["dangling link", "link to itself", "dangling folder", "folder that cannot be listed", "doubtful tree"])
def test_no_trouble_hides_that_an_image_has_changed(tmp_path, trouble, monkeypatch):
    root = plant(tmp_path / "p", "cats=3", "dogs=3")
    if trouble == "dangling link":
        (root / "cats" / "x.png").symlink_to(tmp_path / "nowhere.png")
    elif trouble == "link to itself":
        (root / "cats" / "x.png").symlink_to(root / "cats" / "x.png")
    elif trouble == "dangling folder":
        (root / "cats" / "more").symlink_to(tmp_path / "nowhere")
    elif trouble == "folder that cannot be listed":
        refuse_to_list(root / "dogs", monkeypatch)
    else:
        plant(root, "owls/cats=1", "cats/cats=1", "cats/dogs=1")
    before = fingerprint(settings(root))
    assert before and before == fingerprint(settings(root))
    touch(root / "cats" / "0.png")
    changed = fingerprint(settings(root))
    (root / "cats" / "1.png").unlink()
    assert len({before, changed, fingerprint(settings(root))}) == 3


def refuse_to_list(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without the right to read it; root has every right."""
    walk = os.walk

    def without(top, *, followlinks, onerror):
        for parent, folders, files in walk(top, followlinks=followlinks, onerror=onerror):
            if parent == str(place):
                onerror(PermissionError(13, "Permission denied", parent))
            else:
                yield parent, folders, files

    monkeypatch.setattr(tree_module.os, "walk", without)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root = plant(tmp_path / "p", "cats=3", "dogs=3", "owls=3")
    refuse_to_list(root / "dogs", monkeypatch)
    with pytest.raises(UserError, match=r"p/dogs .*Permission denied"):
        read(root)


def test_an_image_that_vanishes_while_it_is_looked_at_is_a_change(tmp_path, monkeypatch):
    root = plant(tmp_path / "p", "cats=3", "dogs=3")
    before, stat = fingerprint(settings(root)), Path.stat

    def gone(path, **options):
        if path.name == "1.png" and path.parent.name == "cats":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", gone)
    assert fingerprint(settings(root)) not in (before, None)


def test_changed_labels_change_the_fingerprint_and_other_text_does_not(tmp_path):
    root = plant(tmp_path / "p", "=2", "notes.txt")
    labels = root / "labels.csv"
    labels.write_text("0.png,cats\n1.png,dogs\n")
    before = fingerprint(settings(root))
    (root / "notes.txt").write_text("something")
    assert fingerprint(settings(root)) == before
    labels.write_text("0.png,dogs\n1.png,cats\n")
    os.utime(labels, ns=(0, 1))
    assert fingerprint(settings(root)) != before
