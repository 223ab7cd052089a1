"""Dataset from a folder of images with one folder per class (as torchvision's ImageFolder), with or without splits: see `folder_layout`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from advml.config import Data, digest
from advml.core.errors import UserError
from advml.core.messages import first_of
from advml.core.paths import given_path
from advml.data.folder_layout import SHOWN, Layout, read_layout
from advml.data.folder_tree import Tree, list_tree, list_unread
from advml.data.images import Pixels, read_files
from advml.data.prepared import UNLABELLED
from advml.data.splits import Source


def folder(data: Data) -> Source:
    """Source of the images at `data.path`, decoded to `data.image_size`, in RGB unless `data.channels` is 1.

    Raises:
        UserError: the folder is missing, cannot be listed, has fewer than two classes, or its meaning is ambiguous.
    """
    root = given_path(data.path)
    if not os.path.isdir(root):  # False, unlike Path.is_dir, for text that cannot be a path
        problem = "is a file; unpack it if it is an archive, and" if os.path.isfile(root) else "does not exist;"
        raise UserError(f"data.path = {data.path!r} {problem} name the folder of images in params.yaml, or with -S data.path=FOLDER")
    tree = list_tree(root)
    for error in tree.errors:
        raise UserError(f"data.path: {error.filename} cannot be listed ({error.strerror}); make it readable")
    return _source(root, data, tree, read_layout(tree.root, data.layout, unlabelled=data.unlabelled))


def fingerprint(data: Data) -> str | None:
    """Fingerprint of the names, sizes and times of the images at `data.path`, which are not opened, and of files with labels.

    Unreadable folders and files enter as such, so that changes of the others are still noticed. None: the folder does not exist.
    """
    root = given_path(data.path)
    if not os.path.isdir(root):
        return None
    tree = list_tree(root)
    try:
        used, refusal = read_layout(tree.root, data.layout, unlabelled=data.unlabelled).tables, None
    except UserError as error:
        used, refusal = [], str(error)
    paths = [path for place in tree.root.below() for path in (*place.images, *place.lost)]
    facts = [(path.relative_to(root).as_posix(), *_size_and_time(path)) for path in (*paths, *used)]
    return digest(facts, sorted((str(error.filename), error.errno) for error in tree.errors), refusal)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        return -1, error.errno or 0
    return status.st_size, status.st_mtime_ns


def _source(root: Path, data: Data, tree: Tree, layout: Layout) -> Source:
    classes = tuple(layout.splits["train"])
    paths: list[Path] = []
    labels: list[int] = []
    given: dict[str, np.ndarray] = {}
    for split, images in layout.splits.items():
        start = len(paths)
        for label, name in enumerate(classes):
            paths += images[name]
            labels += [label] * len(images[name])
        given[split] = np.arange(start, len(paths))
    paths += layout.unlabelled
    if data.unlabelled and not layout.unlabelled:
        raise UserError(
            f"data.unlabelled = true, but {root} has no folder unlabelled beside train; add it, or set data.unlabelled to false"
        )
    if not classes:
        given = {}
    elif layout.unlabelled:
        given[UNLABELLED] = np.arange(len(labels), len(paths))
    labels += [-1] * len(layout.unlabelled)

    def read(chosen: np.ndarray) -> Pixels:
        files = [paths[index] for index in chosen]
        return read_files(files, size=data.image_size, channels=data.channels or 3, white=data.white_level)

    def title(index: int) -> str:
        return paths[index].relative_to(root).as_posix()

    return Source(
        f"folder {root.name or root}",
        classes,
        np.array(labels, dtype=np.int64),
        read,
        given,
        ignored=sum(place.files for place in tree.root.below()) - len(paths),
        remarks=(*layout.remarks, *_left_out(tree)),
        title=title,
    )


def _left_out(tree: Tree) -> list[str]:
    names = [f"{name} ({count})" if count > 1 else name for name, count in sorted(tree.left_out.items())]
    clutter = [f"folders left out, hidden or made by a system or program: {first_of(names, SHOWN)}"] if names else []
    others = [path.relative_to(tree.root.path).as_posix() for folder in tree.root.below() for path in folder.others]
    files = [f"files left out, no images: {first_of(others, SHOWN)}"] if others else []
    unread = list_unread(tree.root.below())
    pictures = [f"pictures left out, of formats that are not read: {unread}; convert them to PNG to use them"] if unread else []
    return clutter + files + pictures
