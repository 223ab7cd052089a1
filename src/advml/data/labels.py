"""Read labels of images in one folder from a text file with one line per image, which begins with the file name.

    1.jpg,cats                                        labels.csv, with or without a header
    filename,width,height,class,xmin,...              a header that names the column of the class (`LABEL_WORDS`)
    val_0.JPEG	n03444034	0	32	44	62            Tiny-ImageNet's val/val_annotations.txt
    1,cats    or    train/1.jpg,cats             also beside the folders of splits: labels.csv for all of them, train.csv for one

Columns are separated by tabs, commas, semicolons, or the first blank of a line. A file with more than two columns is refused unless it
has Tiny-ImageNet's form or a header that names the class column: the second column may be a coordinate, a size, or one of several 0/1
columns.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from advml.core.errors import UserError
from advml.core.messages import first_of
from advml.data.folder_tree import composed
from advml.data.split_names import split_of

# Headers of the class column, reduced to lower-case letters.
LABEL_WORDS = frozenset(
    (
        *("class", "classes", "classname", "classid", "classlabel", "classindex"),
        *("label", "labels", "labelname", "labelid", "labelindex"),
        *("category", "categories", "categoryname", "categoryid"),
        *("target", "targets", "groundtruth", "species", "breed", "diagnosis"),
    )
)
SHOWN = 12  # number of columns in a message
Known = dict[str, Path | None]  # name of an image in a table -> the image; None: it is in another split
NUMBER = re.compile(r"\s*[+-]?\d+(\.\d*)?\s*")


def read_labels(tables: list[Path], images: list[Path], *, others: Sequence[Path] = ()) -> tuple[Path, dict[str, list[Path]]] | None:
    """Find the text file that names the images, and read the images of each class; None if no file names any of them.

    Args:
        others: images of other splits, which a file beside the splits may also name, unless it has the name of one split (`train.csv`).
    Raises:
        UserError: several files name the images; or the file lacks an image, names one that does not exist, or gives one two classes.
    """
    naming = [(table, rows, known) for table in tables if (rows := _rows(table)) and (known := _known(table, rows, images, others))]
    if len(naming) > 1:
        raise UserError(f"{naming[0][0]} and {naming[1][0].name} both name the images beside them; keep the one with their classes")
    return (naming[0][0], _by_class(*naming[0], images)) if naming else None


def _by_class(table: Path, rows: list[list[str]], known: Known, images: list[Path]) -> dict[str, list[Path]]:
    column = _label_column(table, rows, header=rows[0][0] not in known)
    if rows[0][0] not in known:
        rows = rows[1:]
    classes: dict[Path, str] = {}
    for row in rows:
        name, label = row[0], composed(row[column].strip()) if len(row) > column else ""
        if name not in known:
            raise UserError(f"{table} names '{name}', which no image or more than one is called; write a line 'FILE,CLASS' for each image")
        if (image := known[name]) is None:
            continue
        if not label:
            raise UserError(f"{table} gives '{name}' no class; write a line 'FILE,CLASS' for each image")
        if classes.setdefault(image, label) != label:
            raise UserError(f"{table} gives '{name}' two classes, '{classes[image]}' and '{label}'; keep one")
    if missing := [image for image in images if image not in classes]:
        raise UserError(f"{table} lacks {len(missing)} of {len(images)} images, e.g. '{missing[0].name}'; add their lines or remove them")
    chosen = defaultdict(list)
    for image in images:
        chosen[classes[image]].append(image)
    return dict(sorted(chosen.items()))


def _label_column(table: Path, rows: list[list[str]], *, header: bool) -> int:
    """Index of the class column: the second one, or that named by the header."""
    width = max(map(len, rows))
    named = [at for at, cell in enumerate(rows[0]) if at and re.sub("[^a-z]", "", cell.lower()) in LABEL_WORDS] if header else []
    if width <= 2 or (not header and all(_is_tiny_imagenet(row) for row in rows)):
        return 1
    if len(named) != 1:
        what = f"{len(named)} of them" if named else "none of them"
        cells = first_of([" ".join(cell.split()) for cell in rows[0]], SHOWN)
        raise UserError(
            f"{table} has {width} columns ({cells}), and {what} has a header that means the class; "
            f"write a line 'FILE,LABEL' for each image, give only the column of the class the header 'class', or remove the file"
        )
    return named[0]


def _is_tiny_imagenet(row: list[str]) -> bool:
    """Whether a row has Tiny-ImageNet's form: a file, a class that is not a number, and four numbers of a box."""
    return len(row) == 6 and not NUMBER.fullmatch(row[1]) and all(map(NUMBER.fullmatch, row[2:]))


def _known(table: Path, rows: list[list[str]], images: list[Path], others: Sequence[Path]) -> Known:
    """Images by the names a table uses: paths from its folder and unique file names, or names without suffix if all rows use these.

    Empty if the table names no images.
    """
    cells = {row[0] for row in rows if len(row) > 1}
    shared = not split_of(table.stem)[0]
    places = {other: None for other in others if shared and table.parent in other.parents} | {image: image for image in images}
    paths = {composed(path.relative_to(table.parent).as_posix()): image for path, image in places.items() if table.parent in path.parents}
    if any(map((known := _unique(places, "name") | paths).get, cells)):
        return known
    return known if set(images) <= set(map((known := _unique(places, "stem")).get, cells)) else {}


def _unique(places: dict[Path, Path | None], part: str) -> Known:
    names = {path: composed(getattr(path, part)) for path in places}
    times = Counter(names.values())
    return {name: places[path] for path, name in names.items() if times[name] == 1}


def _rows(table: Path) -> list[list[str]]:
    """Rows of a table that are not empty, without trailing empty cells; none if the file is not text."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        first = text.lstrip().partition("\n")[0]
        if separator := next((mark for mark in "\t,;" if mark in first), None):
            rows = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        else:  # a class name may contain blanks
            rows = ([cell.strip().strip('"') for cell in line.split(maxsplit=1)] for line in io.StringIO(text))
        return [[composed(row[0].strip()), *_filled(row[1:])] for row in rows if row and row[0].strip()]
    except OSError as error:
        raise UserError(f"{table} cannot be read ({error.strerror}); repair or remove it") from None
    except (UnicodeDecodeError, csv.Error):
        return []


def _filled(cells: list[str]) -> list[str]:
    while cells and not cells[-1].strip():
        cells.pop()
    return cells
