"""Names of folders and files that systems and programs leave among images: neither classes nor images of the user.

They are left out at every depth, whatever they hold: thumbnails of a network drive would count each image twice.
"""

from __future__ import annotations

# Compared without regard to case. Hidden names need no row: `.ipynb_checkpoints`, `.thumbnails`, `.Trash-1000`, `.git`, `._photo.jpg`.
NAMES = frozenset(
    name.casefold()
    for name in (
        # Windows
        *("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "$Extend", "System Volume Information", "WPSystem", "found.000"),
        *("Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
        # macOS
        *("__MACOSX", "Icon\r", "Network Trash Folder", "Temporary Items"),
        # network drives: Synology, QNAP, NetApp
        *("@eaDir", "@tmp", "@sharebin", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "@__thumb", "~snapshot", "lost+found"),
        # programs
        *("__pycache__", "_vti_cnf"),
    )
)


def is_clutter(name: str) -> bool:
    """Whether a folder or file of this name is hidden, or made by a system or a program."""
    return name.startswith(".") or name.casefold() in NAMES
