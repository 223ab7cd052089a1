"""Find images with identical pixels: in two splits, with two labels, or twice in one split.

A test image that was also trained on measures memorisation, and a picture with two labels has a wrong one. Pixels are compared after
preparation (decoded, resized and cropped), by the sha256 of each image's tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from advml.data.prepared import NAMES, SPLITS, UNLABELLED
from advml.data.splits import Rows, Source

EXAMPLES = 10  # number of pictures whose copies are listed in dataset.json
PRECEDENCE = ("test", "validation", "train", UNLABELLED)  # the copy in the first of these splits is kept


@dataclass(frozen=True, eq=False)
class Copies:
    """Images grouped by their pixels.

    Attributes:
        split, label, picture: (N,), for each image the index of its split in `names`, its label or -1, the index of its group.
        names: of the splits.
    """

    split: np.ndarray
    label: np.ndarray
    picture: np.ndarray
    names: tuple[str, ...] = SPLITS

    @property
    def counts(self) -> np.ndarray:
        """Number of occurrences of each picture in each split (pictures, splits)."""
        shape = (self.picture.max(initial=-1) + 1, len(self.names))
        return np.bincount(self.picture * shape[1] + self.split, minlength=shape[0] * shape[1]).reshape(shape)

    @property
    def contradictory(self) -> np.ndarray:
        """Mask (pictures,) of pictures with more than one label."""
        labels, known = self.label.max(initial=0) + 1, self.label >= 0
        pairs = np.unique(self.picture[known] * labels + self.label[known])
        return np.bincount(pairs // labels, minlength=self.picture.max(initial=-1) + 1) > 1


def find(images: np.ndarray, *, labels: np.ndarray, split: np.ndarray, names: tuple[str, ...] = SPLITS) -> Copies:
    """Group images (uint8, N x C x H x W) by their pixels; `labels` and `split` are (N,)."""
    numbers: dict[bytes, int] = {}
    picture = [numbers.setdefault(hashlib.sha256(np.ascontiguousarray(image)).digest(), len(numbers)) for image in images]
    return Copies(split, labels, np.array(picture, dtype=np.int64), names)


def describe(copies: Copies) -> dict[str, Any]:
    """Summary for dataset.json.

    Returns:
        `pictures`: number of different pictures that occur more than once; `images`: number of all their occurrences; `between`: number
        of pictures that two splits share; `labels`: number of pictures with more than one label; `within`: surplus occurrences in a split.
    """
    counts = copies.counts
    repeated = counts.sum(1) > 1
    columns = dict(zip(copies.names, counts.T, strict=True))
    return {
        "pictures": int(repeated.sum()),
        "images": int(counts[repeated].sum()),
        "between": {
            f"{one} and {other}": int(((columns[one] > 0) & (columns[other] > 0)).sum()) for one, other in combinations(columns, 2)
        },
        "labels": int(copies.contradictory.sum()),
        "within": {name: int(np.maximum(column - 1, 0).sum()) for name, column in columns.items()},
    }


def examples(copies: Copies) -> list[np.ndarray]:
    """Positions of all occurrences of a few repeated pictures: first pictures with two labels, then pictures in several splits."""
    counts = copies.counts
    repeated = np.flatnonzero(counts.sum(1) > 1)
    rank = 2 * copies.contradictory + ((counts > 0).sum(1) > 1)
    chosen = repeated[np.argsort(-rank[repeated], kind="stable")][:EXAMPLES]
    return [np.flatnonzero(copies.picture == picture) for picture in chosen]


def unique(copies: Copies) -> np.ndarray:
    """Mask (N,) of the images to keep so that no picture occurs twice.

    The copy in test is kept, else that in validation, else that in train, else an unlabelled one; within a split, the first. A picture
    with two labels is removed altogether, because it is not known which label is right.
    """
    order = np.array([PRECEDENCE.index(name) for name in copies.names])[copies.split].argsort(kind="stable")
    _, first = np.unique(copies.picture[order], return_index=True)
    stays = np.zeros(len(order), dtype=bool)
    stays[order[first]] = True
    return stays & ~copies.contradictory[copies.picture]


def treat(rows: Rows, source: Source, *, drop: bool) -> tuple[Rows, dict[str, Any]]:
    """Rows, without duplicates if `drop` is true, and the entry on duplicates for dataset.json. Labels of `unlabelled` are ignored."""
    names = NAMES if len(SPLITS) in rows.split else SPLITS
    labels = np.where(rows.split < len(SPLITS), source.labels[rows.indices], -1)

    def listed(at: int) -> dict[str, str | None]:
        known = source.classes[labels[at]] if labels[at] >= 0 else None
        return {"image": source.title(rows.indices[at]), "split": names[rows.split[at]], "class": known}

    copies = find(rows.images, labels=labels, split=rows.split, names=names)
    stays = unique(copies) if drop else np.ones(len(rows.split), dtype=bool)
    dropped = np.bincount(rows.split[~stays], minlength=len(names)).tolist()
    few = [[listed(at) for at in group] for group in examples(copies)]
    found = describe(copies) | {"dropped": dict(zip(names, dropped, strict=True)), "examples": few}
    return rows.keep(stays), found


def sentence(found: Mapping[str, Any]) -> str:
    """Note on the `duplicates` of dataset.json, in lower case and without full stop."""
    parts = [f"{count} in both {pair}" for pair, count in found["between"].items() if count]
    parts += [f"{found['labels']} with more than one label"] if found["labels"] else []
    parts += [f"{count} surplus in {name}" for name, count in found["within"].items() if count]
    first, second = ("".join(letter if letter.isprintable() else "?" for letter in one["image"]) for one in found["examples"][0][:2])
    dropped = [f"{count} from {name}" for name, count in found["dropped"].items() if count]
    done = f"left out: {', '.join(dropped)}" if dropped else "kept; leave them out with -S data.duplicates=drop"
    plural = "picture occurs" if found["pictures"] == 1 else "pictures occur"
    return f"{found['pictures']} {plural} as {found['images']} identical images ({', '.join(parts)}; e.g. {first} and {second}); {done}"
