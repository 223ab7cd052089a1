"""List a folder and everything below it, once: images, text files that may contain labels, dangling links."""

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

# Names of folders and files that are neither classes nor images of the user.
#
# Folders made by systems and programs are skipped at every depth: the thumbnails of a network drive would count each image twice. Names
# that suggest derived images, such as masks, are left to the caller to refuse, because `masks` may be a class.

# Skipped folders, compared without regard to case. Hidden folders (`.ipynb_checkpoints`, `.Trash-1000`, ...) are skipped in any case.
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
    """Whether a folder or file of this name is skipped: hidden (`._photo.jpg`), or a folder made by a system or program."""
    return name.startswith(".") or name.casefold() in FOLDERS


# Words for images derived from other images: `12_mask.png` or `12-seg_1.png` beside `12.png`, folders called `masks` or `seg_maps`.
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
    """Name of the original from which a file or folder (without suffix) seems to be derived; None if the name does not suggest it.

    >>> [original_of(name) for name in ("12_mask", "benign (3)-seg_1", "masks", "SegmentationClass", "masked")]
    ['12', 'benign (3)', '', '', None]
    """
    found = _DERIVED.fullmatch(name)
    return (found[1] or found[2] or "") if found else None


# The listing

TABLES = frozenset((".csv", ".tsv", ".txt"))


@dataclass(eq=False)
class Folder:
    """A folder and its direct content, sorted by name, without skipped names.

    Attributes:
        images: files with an image's suffix, dangling links included.
        tables: text files.
        lost: links to folders that do not exist.
        unread: suffix -> number of files that seem to be pictures of a format that is not read.
        others: all other files.
        hidden: number of skipped files.
        twin: another path of this folder, under which it was listed already; then all other attributes are empty.
    """

    path: Path
    folders: list[Folder] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    lost: list[Path] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    others: list[Path] = field(default_factory=list)
    hidden: int = 0
    twin: Path | None = None

    @property
    def name(self) -> str:
        """Name in Unicode's composed form, because archives made on a Mac spell `é` with two characters."""
        return composed(self.path.name)

    @property
    def files(self) -> int:
        return len(self.images) + len(self.tables) + len(self.lost) + self.unread.total() + len(self.others) + self.hidden

    @property
    def holds_images(self) -> bool:
        return any(folder.images for folder in self.below())

    @property
    def subfolders(self) -> list[Folder]:
        """Subfolders that may be splits or classes.

        Raises:
            UserError: one is a dangling link, or a link to another one.
        """
        if self.lost:
            raise UserError(f"{self.lost[0]} is a link to something that does not exist; repair or remove it")
        for folder in self.folders:
            if folder.twin:
                raise folder.twin_error
        return self.folders

    @property
    def twin_error(self) -> UserError:
        return UserError(f"{self.path} and {self.twin} are the same folder, so its images would count twice; remove the link")

    def below(self) -> Iterator[Folder]:
        """Yield this folder and all folders below it."""
        waiting = [self]
        while waiting:
            yield (folder := waiting.pop())
            waiting += reversed(folder.folders)


@dataclass(frozen=True, eq=False)
class Tree:
    """Result of `list_tree`.

    Attributes:
        left_out: name of skipped folders -> their number.
        errors: errors of folders that cannot be listed.
    """

    root: Folder
    left_out: Counter[str]
    errors: list[OSError]


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def list_tree(place: Path) -> Tree:
    """List a folder and everything below it; follows links, and lists no folder twice."""
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
        folder.hidden += 1
    elif suffix in SUFFIXES:
        folder.images.append(path)
    elif suffix in TABLES:
        folder.tables.append(path)
    elif not re.search("[a-z]", suffix) and not path.exists():  # a suffix without letters, as in `v1.0`: probably a folder
        folder.lost.append(path)
    elif suffix in UNREAD:
        folder.unread[suffix] += 1
    else:
        folder.others.append(path)


def list_unread(folders: Iterable[Folder]) -> str:
    """Number of pictures in formats that are not read, by suffix: `900 .dng, 2 .psd`; empty if there are none."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(sum((one.unread for one in folders), Counter()).items()))
