"""Names of folders and files among images that are neither classes nor images of the user.

What systems and programs leave is left out at every depth, whatever it holds: the thumbnails of a network drive would count each image
twice. What seems to be made from other images, as a mask is, is for the caller to refuse: `masks` may be a class.
"""

from __future__ import annotations

import re

# Folders, compared without regard to case. Hidden ones need no row: `.ipynb_checkpoints`, `.thumbnails`, `.Trash-1000`, `.AppleDouble`.
FOLDERS = frozenset(
    name.casefold()
    for name in (
        *("$RECYCLE.BIN", "System Volume Information", "found.000"),  # Windows
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
