"""Decide which folders of a tree are splits, which are classes, and which images belong to them.

    photos/cats/1.jpg                           classes
    photos/Training/cats/1.jpg                  splits, under any usual name (`split_of`), of classes
    photos/dataset/train/cats/1.jpg             either of them inside a single folder
    val/images/1.jpg, val/val_annotations.txt   a split with labels in a text file (`labels`); likewise a folder without splits
    train/1.jpg, labels.csv or train.csv        a split with labels in a text file beside it

A tree with two possible meanings is refused: if splits were read as classes, a network would learn to tell train from test.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from advml.core.errors import UserError
from advml.core.messages import first_of
from advml.data.folder_tree import Folder, list_unread, original_of
from advml.data.labels import read_labels
from advml.data.split_names import split_of

# Order of class names: this project numbers labels in text order; timm's trainer in natural order.


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names in natural order: runs of digits as numbers, letters without regard to case.

        >>> natural_order(["10", "2", "1"]), sorted(["10", "2", "1"])
        (['1', '2', '10'], ['1', '10', '2'])

    timm's trainer numbers class folders in this order (`timm.utils.misc.natural_key`); torchvision's ImageFolder and this project sort
    as text. Names that compare equal (`a1`, `A01`) are sorted as text among themselves.
    """
    return sorted(names, key=lambda name: (_parts(name), name))


def few(classes: Sequence[str], *, shown: int = 3) -> str:
    """Short description of classes: `10 classes (0, 1, 2 and 7 more)`."""
    return f"{len(classes)} classes ({first_of([str(name) for name in classes], shown)})"


def _parts(name: str) -> list[str | int]:
    """Split a name into alternating text and numbers, e.g. 'img12b' -> ['img', 12, 'b'], so that text is never compared with a number."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]


# Class folders of one split: their images, and checks that they are classes

Classes = dict[str, list[Path]]  # class name -> its images, sorted by path
SHOWN = 12  # number of names in a note
ORIGINALS = frozenset(
    ("image", "images", "img", "imgs", "jpegimages", "original", "originals", "photo", "photos", "picture", "pictures", "raw")
)


def images_by_class(place: Folder) -> Classes:
    """Images of the class folders in `place`, sorted by name; folders whose names differ only in Unicode form are one class.

    Raises:
        UserError: a class has no images, or is a link to the folder of another one.
    """
    folders: dict[str, list[Folder]] = defaultdict(list)
    for folder in place.subfolders:
        folders[folder.name].append(folder)
    return {name: _images(folders[name]) for name in sorted(folders)}


def _images(folders: list[Folder]) -> list[Path]:
    parts = [part for folder in folders for part in folder.below()]
    for part in parts:
        if part.twin and not any(folder.path in (part.twin, *part.twin.parents) for folder in folders):
            raise part.twin_error
    images = [image for part in parts for image in (*part.images, *part.lost)]
    if not images:
        unread = list_unread(parts)
        reason = f"no images of a readable format; convert {unread} to PNG" if unread else "no images; add some or remove the folder"
        raise UserError(f"{folders[0].path} contains {reason}")
    return sorted(images, key=lambda path: path.as_posix())


def check_meaning(place: Folder, *, layout: str) -> None:
    """Refuse folders that look like splits or groups of images, not classes; `layout`: the value of data.layout that allows them.

    Raises:
        UserError: several of the folders contain subfolders of the same names with images; or one of them contains splits, or what
            seem to be masks.
    """
    _refuse_masks(place, layout=layout)
    remedy = f"if the folders in {place.path} are the classes, set data.layout={layout}"
    holders: dict[str, dict[str, Path]] = defaultdict(dict)
    for folder in place.folders:
        for part in folder.below():
            if len(splits := _splits_in(part)) > 1:
                raise UserError(
                    f"{part.path} contains {' and '.join(splits)}, which are names of splits; give it alone as data.path, "
                    f"or arrange the images as {splits[0]}/CLASS/1.jpg, or, {remedy}"
                )
            if part is not folder and part.images:
                holders[part.name.casefold()].setdefault(folder.name, part.path)
    shared = [list(places.values()) for places in holders.values() if len(places) > 1]
    if shared and any(folder.images for folder in place.folders):
        raise UserError(
            f"{shared[0][0]} and {shared[0][1]} have the same name, and there are images beside such folders, so they may contain masks, "
            f"thumbnails or groups of images; move them out of {place.path}, or, to read their images as well, {remedy}"
        )
    if shared and len(holders) > 1:  # one folder `images` in each class folder is common, and accepted
        raise UserError(
            f"{shared[0][0]} and {shared[0][1]} have the same name, so the folders in {place.path} look like splits or groups of images; "
            f"rename splits to train, validation and test, or give one group as data.path, or, {remedy}"
        )


def _refuse_masks(place: Folder, *, layout: str) -> None:
    """Raise UserError if images or folders seem to be masks or annotations, which would be read as images of a class, or as a class."""
    remedy = f"move them out of {place.path}, or, if they are images like the others, set data.layout={layout}"
    classes = [folder for folder in place.folders if folder.holds_images]
    for folder in classes:
        holding = [part for part in folder.below() if part.images]
        for part in holding:
            if part is not folder and len(holding) > 1 and original_of(part.name) is not None:
                raise UserError(f"{part.path} seems to contain masks, annotations or thumbnails of images in {folder.path}; {remedy}")
            stems = {image.stem for image in part.images}
            if masks := [image for image in part.images if original_of(image.stem) in stems]:
                raise UserError(
                    f"{masks[0]} seems to be a mask or an annotation of {original_of(masks[0].stem)}{masks[0].suffix}, like "
                    f"{len(masks)} of {len(part.images)} images in this folder, judged by their names; {remedy}"
                )
        if original_of(folder.name) is not None and (images := [one for one in classes if one.name.casefold() in ORIGINALS]):
            raise UserError(f"{folder.path} seems to contain masks, annotations or thumbnails of images in {images[0].path}; {remedy}")


def _splits_in(folder: Folder) -> list[str]:
    """Names of the subfolders that stand for different splits."""
    found = {split_of(one.name)[0]: one.path.name for one in folder.folders if one.holds_images}
    return sorted(name for split, name in found.items() if split not in (None, "unlabelled"))


def remarks_on_names(classes: Iterable[str]) -> list[str]:
    """Notes on class names: labels whose order differs from natural order, and names that differ only in capitals.

    Raises:
        UserError: two names differ only in spaces, or one cannot be printed.
    """
    names, remarks = list(classes), []
    trimmed: dict[str, str] = {}
    lowered: dict[str, str] = {}
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise UserError(f"the class name {name!r} contains control characters or broken UTF-8; rename it")
        plain = " ".join(name.split())
        if (other := trimmed.setdefault(plain, name)) != name:
            raise UserError(f"the class names '{other}' and '{name}' differ only in spaces; rename one, or put their images together")
        if (other := lowered.setdefault(plain.casefold(), name)) != name:
            remarks.append(f"the class names '{other}' and '{name}' differ only in capitals, and are two classes")
    if natural_order(names) != names:
        numbers = first_of([f"{label} -> {name}" for label, name in enumerate(names)], SHOWN)
        remarks.append(
            f"labels are numbered in text order of the class names: {numbers}; models from elsewhere may use natural order (1, 2, 10)"
        )
    return remarks


# Splits and classes of a whole tree

REMEDY = "if all of them are classes, set data.layout=classes"


@dataclass(frozen=True)
class Layout:
    """Images of `train`, and of `validation` and `test` if these folders exist, by class.

    Attributes:
        unlabelled: images without labels, for training.
        tables: files from which labels were read.
        remarks: notes for the user, one line each.
    """

    splits: dict[str, Classes]
    tables: list[Path]
    remarks: list[str]
    unlabelled: list[Path]


def read_layout(root: Folder, layout: str, *, unlabelled: bool = False) -> Layout:
    """Sort the images of a tree into splits and classes.

    Args:
        layout: meaning of the top folders: 'classes', 'splits', or 'auto', which decides by their names, and refuses ambiguous ones.
        unlabelled: read images without labels: those in a folder `unlabelled` beside splits, or all of a folder without classes.
    Raises:
        UserError: the tree has fewer than two classes, its splits have different classes, or its meaning is ambiguous.
    """
    place, splits, remarks = root, _splits(root, layout), []
    while not splits and (inner := _only_folder(place)) and any(folder.holds_images for folder in inner.folders):
        place, splits = inner, _splits(inner, layout)
    if layout == "splits" and not splits:
        raise UserError(f"data.layout = 'splits', but {place.path} contains no folder of training images; name it train")
    if place is not root:
        remarks.append(f"{place.path} is read, as {root.path} contains nothing else")
    if not splits and layout == "auto":
        remarks += [
            f"{one.path} is read as a class like the folders beside it; remove it if it is not, or set data.layout=classes"
            for one in place.folders
            if one.holds_images and split_of(one.name) == ("train", "")
        ]
    pools = [one for one in place.folders if unlabelled and splits and one.holds_images and one not in splits.values()]
    pool = [image for one in pools for image in _images([one])]
    if splits:
        remarks += [f"{one.path} is not a split, and is left out" for one in place.folders if one not in (*splits.values(), *pools)]
    beside = {split: [table for table in place.tables if split_of(table.stem)[0] in (None, split)] for split in splits}
    everywhere = [image for one in splits.values() for part in one.below() for image in part.images]
    found: dict[str, Classes] = {}
    tables: list[Path] = []
    for split, folder in (splits or {"train": place}).items():
        inner, labels = _labelled(folder, known=found.get("train", {}), beside=beside.get(split, []), others=everywhere)
        if labels:
            table, found[split] = labels
            tables.append(table)
            remarks.append(f"labels of {split} are read from {table}: {few(list(found[split]), shown=SHOWN)}")
        elif inner.folders:
            found[split] = images_by_class(inner)
            if layout == "auto":
                check_meaning(inner, layout="splits" if splits else "classes")
            remarks += _remarks_on_folders(inner, found[split])
        elif split == "test":
            remarks.append(f"{len(inner.images)} images in {inner.path} have no labels: left out")
        elif unlabelled and not splits and inner.images:
            return Layout({"train": {}}, [], remarks, _images([inner]))
        else:
            alone = "" if splits or not inner.images else ", or, to pretrain without labels, set data.unlabelled=true"
            raise UserError(_without_labels(inner) + (f"; or, {REMEDY}" if splits else alone))
    _check_classes(found, splits or {"train": place})
    if splits:
        shares = [f"{split}: a share of train" for split in ("validation", "test") if split not in found]
        remarks.insert(0, "; ".join(["splits: " + ", ".join(f"{split} = {splits[split].path.name}" for split in found), *shares]))
        # This order numbers the images, on which splits depend.
        found = dict(sorted(found.items(), key=lambda item: splits[item[0]].path.name))
    return Layout(found, tables, remarks + remarks_on_names(found["train"]), pool)


def _remarks_on_folders(place: Folder, classes: Classes) -> list[str]:
    remarks = []
    if merged := len(place.folders) - len(classes):
        remarks.append(f"{merged} class folders in {place.path} have the name of another in a different Unicode form: read as one class")
    if place.images:
        remarks.append(f"{len(place.images)} images in {place.path} are beside the class folders: left out")
    return remarks


def _without_labels(place: Folder) -> str:
    file = f", or name the class of each of its {len(place.images)} images in {place.path}/labels.csv: 1.jpg,cats" if place.images else ""
    return (
        f"{place.path} contains no class folders; put the images of each class into a folder of its own, e.g. {place.path}/cats/1.jpg{file}"
    )


def _check_classes(found: dict[str, Classes], folders: dict[str, Folder]) -> None:
    """Raise UserError unless there are at least two classes, the same ones in every split."""
    train, place = found["train"], folders["train"].path
    if len(train) < 2:
        raise UserError(f"{place} contains only one class ('{next(iter(train))}'); put the images of each class into a folder of its own")
    for split, classes in found.items():
        if different := sorted(train.keys() ^ classes.keys()):
            here, there = (place, folders[split].path) if different[0] in train else (folders[split].path, place)
            raise UserError(f"class '{different[0]}' is in {here} but not in {there}; both need the same classes, spelt equally")


def _splits(root: Folder, layout: str) -> dict[str, Folder]:
    """Split -> its folder, `train` first; empty if the folders are classes."""
    folders = [folder for folder in root.subfolders if folder.holds_images]
    groups: dict[str, dict[str, list[Folder]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders if layout != "classes" else ():
        split, rest = split_of(folder.name)
        if split:
            groups[rest][split].append(folder)
    named = [group for group in groups.values() if len(group.keys() - {"unlabelled"}) > 1]  # a single `seg_train` may mean anything
    plain = {split: places for split, places in groups.get("", {}).items() if split != "unlabelled"}
    nested = any(below.holds_images for places in plain.values() for place in places for below in place.folders)
    alone = len(folders) == sum(map(len, groups[""].values()))
    if plain and not named and (nested or alone or layout == "splits"):
        named = [groups[""]]  # `train` with images directly in it, beside other class folders, is a class
    if not named and not alone and layout == "auto":
        for split, places in groups.get("", {}).items():
            if split != "train":
                beside = next(folder.path.name for folder in folders if split_of(folder.name)[1] or not split_of(folder.name)[0])
                arrange = "" if split == "unlabelled" else f" and {split}/CLASS/1.jpg"
                raise UserError(
                    f"{root.path} contains '{places[0].path.name}', a name for {split} images, beside '{beside}'; "
                    f"remove it, arrange the images as train/CLASS/1.jpg{arrange}, or, {REMEDY}"
                )
    return _one_folder_each(root, folders, named) if named else {}


def _one_folder_each(root: Folder, folders: list[Folder], named: list[dict[str, list[Folder]]]) -> dict[str, Folder]:
    chosen = [(split, folder) for group in named for split, places in group.items() for folder in places]
    splits = {split: folder for split, folder in chosen if split != "unlabelled"}
    for split, folder in chosen:
        if split != "unlabelled" and splits[split] is not folder:
            raise UserError(
                f"{root.path} contains '{splits[split].path.name}' beside '{folder.path.name}', both names for {split}; "
                f"arrange the images as {split}/CLASS/1.jpg, or, {REMEDY}"
            )
    if "train" not in splits:
        raise UserError(f"{root.path} contains '{chosen[0][1].path.name}' but no 'train' folder; add it, or, {REMEDY}")
    if other := [folder for folder in folders if folder not in [one for _, one in chosen]]:
        names = ", ".join(sorted(folder.path.name for folder in splits.values()))
        raise UserError(f"{root.path} contains '{other[0].path.name}' beside {names}; remove it, or, {REMEDY}")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _only_folder(place: Folder, known: Classes | None = None) -> Folder | None:
    """Single folder in `place`, if there is nothing else and it is not a class; else None."""
    folders = place.subfolders
    alone = len(folders) == 1 and not place.images and folders[0].holds_images and folders[0].name not in (known or {})
    return folders[0] if alone else None


def _labelled(folder: Folder, *, known: Classes, beside: list[Path], others: list[Path]) -> tuple[Folder, tuple[Path, Classes] | None]:
    """Folder with the class folders of a split; or, without these, its images, with labels from a text file in it or `beside` it."""
    tables = [*beside, *folder.tables]
    while inner := _only_folder(folder, known):
        folder = inner
        tables += folder.tables
    return folder, None if any(one.holds_images for one in folder.subfolders) else read_labels(
        tables, folder.images, others=[image for image in others if folder.path not in image.parents]
    )
