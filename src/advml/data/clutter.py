"""Names of folders and files that systems and programs leave among images: neither classes nor images of the user.

They are left out at every depth, whatever they hold: the thumbnails of a network drive would count each image twice.
"""

from __future__ import annotations

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
