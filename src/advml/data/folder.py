"""Any folder of images whose class folders name the classes (torchvision's ImageFolder layout).

    photos/cats/1.jpg                                  a flat tree, divided by `data.test` and `data.validation`
    photos/{train,test}/cats/1.jpg                     a test split, kept as it is; `validation` (val, valid) likewise

Class folders may be nested inside. Classes and files are sorted by name, so that the order is the same everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from advml.config import Data, digest
from advml.data.images import SUFFIXES, Pixels, read_files
from advml.data.splits import Source
from advml.errors import UserError
from advml.paths import given_path

SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


def folder(data: Data) -> Source:
    """The tree at `data.path`; images are decoded to `data.image_size`, in RGB unless `data.channels` is 1.

    Raises:
        UserError: if the tree is missing or is no tree of at least two class folders with images.
    """
    root = given_path(data.path)
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserError(f"data.path = '{data.path}' {problem}; name the folder of images in params.yaml, or with -S data.path=FOLDER")
    try:
        return _source(root, data)
    except OSError as error:
        raise UserError(f"data.path: {error.filename} cannot be listed ({error.strerror}); give the right to read it") from None


def fingerprint(data: Data) -> str | None:
    """Of names, sizes and times of the images at `data.path`, none of which is opened; None if they cannot be listed."""
    root = given_path(data.path)
    try:
        images, _ = _images(root)
        facts = [(path.relative_to(root).as_posix(), *_size_and_time(path)) for path in images]
    except OSError:
        return None
    return digest(facts)


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _source(root: Path, data: Data) -> Source:
    folders = _split_folders(root)
    trees = {name: {path.name: path for path in _subfolders(tree)} for name, tree in folders.items()}
    classes = _classes(folders, trees)
    ignored = sum(len(_loose_files(place)) for place in {root, *folders.values()})
    paths: list[Path] = []
    labels: list[int] = []
    given: dict[str, np.ndarray] = {}
    for name, tree in trees.items():
        start = len(paths)
        for label, class_name in enumerate(classes):
            images, others = _images(tree[class_name])
            if not images:
                raise UserError(f"{tree[class_name]} holds no images; add some or remove the folder")
            ignored += others
            paths += images
            labels += [label] * len(images)
        given[name] = np.arange(start, len(paths))

    def read(chosen: np.ndarray) -> Pixels:
        files = [paths[index] for index in chosen]
        return read_files(files, size=data.image_size, channels=data.channels or 3, white=data.white_level)

    def title(index: int) -> str:
        return paths[index].relative_to(root).as_posix()

    return Source(f"folder {root.name or root}", classes, np.array(labels), read, given, ignored, title)


def _split_folders(root: Path) -> dict[str, Path]:
    """{'train': root/train, 'test': root/test}, or {'train': root} of a flat tree, all of which is divided."""
    folders = _subfolders(root)
    named = [path for path in folders if path.name.lower() in SPLIT_FOLDERS]
    if not named or (len(named) < len(folders) and not any(_holds_classes(path) for path in named)):
        return {"train": root}  # beside other classes, one that is called `train` is a class: its images lie in it directly
    splits = {SPLIT_FOLDERS[path.name.lower()]: path for path in named}
    if "train" not in splits:
        raise UserError(f"{root} holds '{named[0].name}' but no 'train' folder; add it, or give the class folders' parent as data.path")
    if len(splits) < len(folders):
        other = next(path for path in folders if path not in splits.values())
        raise UserError(
            f"{root} holds '{other.name}' beside {', '.join(sorted(path.name for path in splits.values()))}; remove it, "
            "or, if they are classes all of them, put their images directly into them"
        )
    return splits


def _holds_classes(place: Path) -> bool:
    """Whether there are folders with images below."""
    return any(_images(folder)[0] for folder in _subfolders(place))


def _classes(folders: dict[str, Path], trees: dict[str, dict[str, Path]]) -> tuple[str, ...]:
    classes, place = tuple(trees["train"]), folders["train"]
    if len(classes) < 2:
        found = f"one class folder only ('{classes[0]}')" if classes else "no class folders"
        raise UserError(f"{place} holds {found}; put the images of each class into a folder of its own, e.g. {place}/cats/1.jpg")
    for name, tree in trees.items():
        if different := sorted(set(classes) ^ set(tree)):
            holder, lacking = (place, folders[name]) if different[0] in classes else (folders[name], place)
            raise UserError(f"class '{different[0]}' is in {holder} but not in {lacking}; both need the same class folders")
    return classes


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _subfolders(place: Path) -> list[Path]:
    return sorted(entry for entry in place.iterdir() if entry.is_dir() and _visible(entry.name))


def _loose_files(place: Path) -> list[Path]:
    return [entry for entry in place.iterdir() if entry.is_file()]


def _images(place: Path) -> tuple[list[Path], int]:
    """All pictures below `place`, sorted by path, and the number of other files. Links are followed, but not in circles."""
    images: list[Path] = []
    others, seen = 0, set()

    def stop(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(place, followlinks=True, onerror=stop):
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if _visible(name) and os.path.realpath(os.path.join(parent, name)) not in seen]
        taken = [name for name in files if _visible(name) and os.path.splitext(name)[1].lower() in SUFFIXES]
        images += [Path(parent, name) for name in taken]
        others += len(files) - len(taken)
    return sorted(images, key=lambda path: path.as_posix()), others
