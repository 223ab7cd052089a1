"""Lists a folder and everything below it, once: images, text files that may hold labels, links that lead nowhere."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from advml.core.errors import UserError
from advml.data.images import SUFFIXES, UNREAD

# Names of folders and files among images that are neither classes nor images of the user.
#
# What systems and programs leave is left out at every depth, whatever it holds: the thumbnails of a network drive would count each image
# twice. What seems to be made from other images, as a mask is, is for the caller to refuse: `masks` may be a class.

# Folders, compared without regard to case. Hidden ones need no row: `.ipynb_checkpoints`, `.thumbnails`, `.Trash-1000`, `.AppleDouble`.
FOLDERS = frozenset(
    name.casefold()
    for name in (
        *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "found.000"),  # Windows
        *("__MACOSX", "Network Trash Folder", "Temporary Items"),  # macOS
        "lost+found",  # Linux
        *("@eaDir", "@tmp", "@sharebin", "#recycle", "#snapshot"),  # Synology
        *("@Recycle", "@Recently-Snapshot", "@__thumb"),  # QNAP
        "~snapshot",  # NetApp
        *("__pycache__", "_vti_cnf"),  # programs
    )
)


def is_clutter(name: str) -> bool:
    """Whether a folder or file of this name is hidden (`._photo.jpg`), or a folder that a system or a program makes."""
    return name.startswith(".") or name.casefold() in FOLDERS


# Words for pictures made from other pictures: `12_mask.png` or `12-seg_1.png` beside `12.png`, folders called `masks` or `seg_maps`.
DERIVED = (
    *("mask", "matte", "alpha", "trimap", "seg", "segm", "segmentation", "segmented", "contour", "outline"),
    *("gt", "groundtruth", "ground_truth", "anno", "annot", "annotation", "annotated", "label", "labelled", "labeled", "bbox", "box"),
    *("depth", "heatmap", "saliency", "edge", "overlay", "thumb", "thumbnail"),
)
_DERIVED = re.compile(
    rf"(?:(.*)[ _.-]|(.*[\d)])|)(?:{'|'.join(DERIVED)})(?:e?s)?(?:[ _.-]?(?:class|object|map|image|img|file)(?:e?s)?)?(?:[ _.-]?\d+)?",
    re.IGNORECASE,
)


def original_of(name: str) -> str | None:
    """What a file or folder, named without suffix, seems to be made from; None if its name does not say so.

    >>> [original_of(name) for name in ("12_mask", "benign (3)-seg_1", "masks", "SegmentationClass", "masked")]
    ['12', 'benign (3)', '', '', None]
    """
    found = _DERIVED.fullmatch(name)
    return (found[1] or found[2] or "") if found else None


# Lists a folder and everything below it, once: images, text files that may hold labels, links that lead nowhere.

TABLES = frozenset((".csv", ".tsv", ".txt"))


@dataclass(eq=False)
class Folder:
    """A folder and what lies directly in it, sorted by name, without clutter.

    Attributes:
        images: files with an image's suffix; a link that leads nowhere may be among them.
        tables: text files.
        lost: links to folders that do not exist.
        unread: suffix -> number of files that seem to be pictures, but of a format that is not read.
        others: number of all other files, clutter included.
        twin: another path of the same folder, under which it is listed already; then everything above is empty.
    """

    path: Path
    folders: list[Folder] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    lost: list[Path] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    others: int = 0
    twin: Path | None = None

    @property
    def name(self) -> str:
        """In Unicode's composed form: a tree that was packed on a Mac spells `é` in two characters."""
        return composed(self.path.name)

    @property
    def files(self) -> int:
        return len(self.images) + len(self.tables) + len(self.lost) + self.unread.total() + self.others

    @property
    def holds_images(self) -> bool:
        return any(folder.images for folder in self.below())

    @property
    def subfolders(self) -> list[Folder]:
        """Those that may be a split or a class each.

        Raises:
            UserError: one of them is missing, or is by a link the same as another one.
        """
        if self.lost:
            raise UserError(f"{self.lost[0]} is a link to something that does not exist; mend or remove it")
        for folder in self.folders:
            if folder.twin:
                raise folder.twin_error
        return self.folders

    @property
    def twin_error(self) -> UserError:
        return UserError(f"{self.path} and {self.twin} are the same folder, so its images would count twice; remove the link")

    def below(self) -> Iterator[Folder]:
        """This folder and all below it."""
        waiting = [self]
        while waiting:
            yield (folder := waiting.pop())
            waiting += reversed(folder.folders)


@dataclass(frozen=True, eq=False)
class Tree:
    """What `list_tree` found.

    Attributes:
        left_out: name of a folder that is clutter -> how many there are.
        errors: of folders that cannot be listed.
    """

    root: Folder
    left_out: Counter[str]
    errors: list[OSError]


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def list_tree(place: Path) -> Tree:
    """Follow links, but list no folder twice."""
    root = Folder(place)
    tree, listed, seen = Tree(root, Counter(), []), {str(place): root}, {os.path.realpath(place): place}
    for parent, folders, files in os.walk(place, followlinks=True, onerror=tree.errors.append):
        here, names = listed[parent], sorted(folders)
        folders.clear()
        for name in names:
            path = os.path.join(parent, name)
            if is_clutter(name):
                tree.left_out[name] += 1
                continue
            real = os.path.realpath(path)
            listed[path] = Folder(Path(path), twin=seen.get(real))
            here.folders.append(listed[path])
            if real not in seen:
                seen[real] = Path(path)
                folders.append(name)
        for name in sorted(files):
            _sort_in(here, name)
    return tree


def _sort_in(folder: Folder, name: str) -> None:
    path, suffix = folder.path / name, os.path.splitext(name)[1].lower()
    if is_clutter(name):
        folder.others += 1
    elif suffix in SUFFIXES:
        folder.images.append(path)
    elif suffix in TABLES:
        folder.tables.append(path)
    elif not re.search("[a-z]", suffix) and not path.exists():  # `v1.0` may be a folder's name
        folder.lost.append(path)
    elif suffix in UNREAD:
        folder.unread[suffix] += 1
    else:
        folder.others += 1


def list_unread(folders: Iterable[Folder]) -> str:
    """Their pictures in formats that are not read: `900 .dng, 2 .psd`; empty if there are none."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(sum((one.unread for one in folders), Counter()).items()))
