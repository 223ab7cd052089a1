"""Labels of images that lie in one folder, from a text file beside them: a line for each image, file name and class first.

    val_0.JPEG	n03444034	0	32	44	62            Tiny-ImageNet's val/val_annotations.txt
    1.jpg,cats                                        labels.csv, with or without a header

Separated by tabs, commas, semicolons or spaces; further columns are ignored.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from pathlib import Path

from advml.data.tree import composed
from advml.errors import UserError


def read_labels(tables: list[Path], images: list[Path]) -> tuple[Path, dict[str, list[Path]]] | None:
    """The text file that names the images, and the images of each class; None if no file names any of them.

    Raises:
        UserError: several files do, or the one that does leaves an image out, names one that is not there, or gives one two classes.
    """
    rows = {table: found for table in tables if (found := _rows(table))}
    naming = [table for table, found in rows.items() if not {row[0] for row in found}.isdisjoint(_by_name(images, table))]
    if len(naming) > 1:
        raise UserError(f"{naming[0]} and {naming[1].name} both name the images beside them; keep the one that holds their classes")
    return (naming[0], _by_class(naming[0], rows[naming[0]], images)) if naming else None


def _by_class(table: Path, rows: list[list[str]], images: list[Path]) -> dict[str, list[Path]]:
    known = _by_name(images, table)
    if rows[0][0] not in known:
        rows = rows[1:]  # a header
    classes: dict[Path, str] = {}
    for row in rows:
        name, label = row[0], composed(row[1].strip()) if len(row) > 1 else ""
        if name not in known:
            raise UserError(f"{table} names '{name}', and there is not one image of that name; write a line 'FILE,CLASS' for each image")
        if not label:
            raise UserError(f"{table} gives '{name}' no class; write a line 'FILE,CLASS' for each image")
        if classes.setdefault(known[name], label) != label:
            raise UserError(f"{table} gives '{name}' two classes, '{classes[known[name]]}' and '{label}'; keep one")
    if missing := [image for image in images if image not in classes]:
        raise UserError(f"{table} lacks {len(missing)} of {len(images)} images, e.g. '{missing[0].name}'; add their lines or remove them")
    chosen = defaultdict(list)
    for image in images:
        chosen[classes[image]].append(image)
    return dict(sorted(chosen.items()))


def _by_name(images: list[Path], table: Path) -> dict[str, Path]:
    """By path from the table's folder, and by bare name where that is unique."""
    count = Counter(image.name for image in images)
    bare = {composed(image.name): image for image in images if count[image.name] == 1}
    return bare | {composed(image.relative_to(table.parent).as_posix()): image for image in images if table.parent in image.parents}


def _rows(table: Path) -> list[list[str]]:
    """Not empty ones; nothing if the file is no text."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        first = text.lstrip().partition("\n")[0]
        separator = next((mark for mark in "\t,;" if mark in first), " ")
        rows = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        return [[composed(row[0].strip()), *row[1:]] for row in rows if row and row[0].strip()]
    except OSError as error:
        raise UserError(f"{table} cannot be read ({error.strerror}); mend or remove it") from None
    except (UnicodeDecodeError, csv.Error):
        return []
