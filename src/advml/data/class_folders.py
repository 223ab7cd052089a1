"""Folders of one split as classes: their images, and what their names and contents say against them."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from advml.data.class_order import natural_order
from advml.data.clutter import original_of
from advml.data.split_names import split_of
from advml.data.tree import Folder
from advml.errors import UserError

Classes = dict[str, list[Path]]  # class name -> its images, sorted by path
SHOWN = 12  # names in a remark
ORIGINALS = frozenset(
    ("image", "images", "img", "imgs", "jpegimages", "original", "originals", "photo", "photos", "picture", "pictures", "raw")
)


def images_by_class(place: Folder) -> Classes:
    """The folders in `place`, sorted by name; two whose names differ only in Unicode form are one class.

    Raises:
        UserError: a class has no images, or shares a folder with another one.
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
        raise UserError(f"{folders[0].path} holds no images; add some or remove the folder")
    return sorted(images, key=lambda path: path.as_posix())


def check_meaning(place: Folder, *, layout: str) -> None:
    """Refuse folders that look like splits or groups rather than classes; `layout` is the value of data.layout that allows them.

    Raises:
        UserError: folders of the same name hold images in several of them, where there are several such names or images beside them;
            or one of them holds splits, or what seems to be masks.
    """
    _refuse_masks(place, layout=layout)
    remedy = f"if the folders in {place.path} are the classes, set data.layout={layout}"
    holders: dict[str, dict[str, Path]] = defaultdict(dict)
    for folder in place.folders:
        for part in folder.below():
            if len(splits := _splits_in(part)) > 1:
                raise UserError(
                    f"{part.path} holds {' and '.join(splits)}, which are names of splits; give it alone as data.path, "
                    f"or arrange the images as {splits[0]}/CLASS/1.jpg, or, {remedy}"
                )
            if part is not folder and part.images:
                holders[part.name.casefold()].setdefault(folder.name, part.path)
    shared = [list(places.values()) for places in holders.values() if len(places) > 1]
    if shared and any(folder.images for folder in place.folders):
        raise UserError(
            f"{shared[0][0]} and {shared[0][1]} have one name, and there are images beside such folders, so they may hold masks, "
            f"thumbnails or groups of images; move them out of {place.path}, or, to read their images as well, {remedy}"
        )
    if shared and len(holders) > 1:  # class folders with one folder `images` each, and nothing else, are a habit
        raise UserError(
            f"{shared[0][0]} and {shared[0][1]} have one name, so the folders in {place.path} look like splits or groups of images; "
            f"rename splits to train, validation and test, or give one group as data.path, or, {remedy}"
        )


def _refuse_masks(place: Folder, *, layout: str) -> None:
    """Masks and annotations would count as images of a class, or be a class."""
    remedy = f"move them out of {place.path}, or, if they are images like the others, set data.layout={layout}"
    classes = [folder for folder in place.folders if folder.holds_images]
    for folder in classes:
        holding = [part for part in folder.below() if part.images]
        for part in holding:
            if part is not folder and len(holding) > 1 and original_of(part.name) is not None:
                raise UserError(f"{part.path} seems to hold masks, annotations or thumbnails of images in {folder.path}; {remedy}")
            stems = {image.stem for image in part.images}
            if masks := [image for image in part.images if original_of(image.stem) in stems]:
                raise UserError(
                    f"{masks[0]} seems to be a mask or an annotation of {original_of(masks[0].stem)}{masks[0].suffix}, as {len(masks)} of "
                    f"{len(part.images)} images in this folder by their names; {remedy}"
                )
        if original_of(folder.name) is not None and (images := [one for one in classes if one.name.casefold() in ORIGINALS]):
            raise UserError(
                f"{folder.path} seems to hold masks, annotations or thumbnails of the images in {images[0].path} and not a class; {remedy}"
            )


def _splits_in(folder: Folder) -> list[str]:
    """Names of its folders that are words for different splits."""
    found = {split_of(one.name)[0]: one.path.name for one in folder.folders if one.holds_images}
    return sorted(name for split, name in found.items() if split not in (None, "unlabelled"))


def remarks_on_names(classes: Iterable[str]) -> list[str]:
    """Where labels are counted otherwise than elsewhere, and names that are nearly the same.

    Raises:
        UserError: two names differ in spaces only, or one cannot be printed.
    """
    names, remarks = list(classes), []
    trimmed: dict[str, str] = {}
    lowered: dict[str, str] = {}
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise UserError(f"the class name {name!r} has control characters or broken UTF-8 in it; rename it")
        plain = " ".join(name.split())
        if (other := trimmed.setdefault(plain, name)) != name:
            raise UserError(f"the class names '{other}' and '{name}' differ in spaces only; rename one or put their images together")
        if (other := lowered.setdefault(plain.casefold(), name)) != name:
            remarks.append(f"the class names '{other}' and '{name}' differ in capitals only and are two classes")
    if natural_order(names) != names:
        numbers = ", ".join(f"{label} -> {name}" for label, name in enumerate(names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
        remarks.append(
            f"labels follow the text order of the class names: {numbers}; a model from elsewhere may follow natural order (1, 2, 10)"
        )
    return remarks
