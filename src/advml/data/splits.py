"""Seeded, stratified, disjoint splits.

The order of images comes from the raw bits of PCG64, a stream that NumPy guarantees (unlike its shuffles and permutations, which may
change between releases), so a seed always gives the same splits. Each class is distributed in that order: first to test, then to
validation, the rest to train. So a smaller `max_train` keeps a subset of the training images of a larger one, and does not change
validation and test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from advml.config import Data
from advml.core.errors import UserError
from advml.data.images import Pixels, fit_arrays
from advml.data.prepared import NAMES, UNLABELLED, Split


@dataclass(frozen=True, eq=False)
class Source:
    """Images before they are split: labels are known, pixels are read later, for the images that are used.

    Attributes:
        name: description of the images' origin.
        labels: int64, (N,): indices into `classes`; -1: none.
        read: function from indices (n,) to the pixels of these images.
        given: splits that the data come with, as indices; without `train`, all labelled images are split, or all if there are no classes.
        ignored: number of files that are not images, or are outside of classes.
        remarks: notes for the user, one line each.
        title: function from an index to the name of an image, e.g. its path below `data.path`.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    read: Callable[[np.ndarray], Pixels]
    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    ignored: int = 0
    remarks: tuple[str, ...] = ()
    title: Callable[[int], str] = "image {}".format


def stored(images: np.ndarray, data: Data) -> Callable[[np.ndarray], Pixels]:
    """Function `read` of a Source whose images (uint8, N x C x H x W) are in memory; converts them to the size and channels of `data`."""
    return lambda chosen: Pixels(fit_arrays(images[chosen], size=data.image_size, channels=data.channels))


@dataclass(frozen=True, eq=False)
class Rows:
    """Images with their indices in the source and the indices of their splits in NAMES, in ascending order of splits."""

    images: np.ndarray
    indices: np.ndarray
    split: np.ndarray

    def keep(self, stays: np.ndarray) -> Rows:
        """Keep the rows under the mask `stays` (N,), by moving them to the front in place, since a copy may not fit into memory."""
        kept = np.flatnonzero(stays)
        for row in np.flatnonzero(kept != np.arange(len(kept))):
            self.images[row] = self.images[kept[row]]
        return Rows(self.images[: len(kept)], self.indices[stays], self.split[stays])

    def divided(self, labels: np.ndarray) -> dict[str, Split]:
        """Splits that have images, as views of `images`; `labels` are those of the whole source."""
        ends = np.searchsorted(self.split, np.arange(1, len(NAMES)))
        parts = zip(NAMES, np.split(self.images, ends), np.split(labels[self.indices], ends), strict=True)
        splits = {name: Split(torch.from_numpy(images), torch.from_numpy(own)) for name, images, own in parts}
        return {name: split for name, split in splits.items() if name != UNLABELLED or len(split)}


def divide(source: Source, data: Data) -> dict[str, np.ndarray]:
    """Divide images into train, validation and test (and `unlabelled`, if there are any); returns indices by split.

    A split that the source comes with is used as it is (cut to `max_test`). `data.validation` and `data.test` are shares of the images
    to divide: all of them, or those of the source's training split. Class proportions are kept as closely as possible, and every split
    gets at least one image of every class. The label budget is applied last: a smaller one keeps a subset of the labels of a larger one,
    and the other images are unlabelled. Each split is stored in the seeded order, because a batch of a single class would change
    contrastive attacks.

    Raises:
        UserError: a class has too few images, or `max_train` or `max_test` are below the number of classes.
    """
    order = np.argsort(np.random.PCG64(data.seed).random_raw(len(source.labels)), kind="stable")

    classes = source.classes or ("without labels",)
    labels = source.labels if source.classes else np.zeros_like(source.labels)

    def by_class(indices: np.ndarray) -> list[np.ndarray]:
        dealt = order[np.isin(order, indices)]
        return [dealt[labels[dealt] == label] for label in range(len(classes))]

    rest = by_class(source.given.get("train", order))
    counts = _sizes(rest)
    wanted = {name: share for name, share in (("test", data.test), ("validation", data.validation)) if name not in source.given}
    _check_enough(counts, classes, ["train", *reversed(wanted)])
    parts = {name: by_class(indices) for name, indices in source.given.items() if name not in ("train", UNLABELLED)}
    for reserved, (name, share) in zip(range(len(wanted), 0, -1), wanted.items(), strict=True):
        limits = _sizes(rest) - reserved
        total = int(np.clip(np.floor(share * counts.sum() + 0.5), len(counts), limits.sum()))
        sizes = _allocate(counts, total, limits)
        parts[name] = _first(rest, sizes)
        rest = [members[size:] for members, size in zip(rest, sizes, strict=True)]
    parts["train"], beyond = _labelled(_at_most(data.max_train, rest, "data.max_train"), data, classes=source.classes)
    parts["test"] = _at_most(data.max_test, parts["test"], "data.max_test")
    if len(pool := np.concatenate([*beyond, source.given.get(UNLABELLED, order[:0])])):
        parts[UNLABELLED] = [pool]
    rank = np.argsort(order)
    return {name: order[np.sort(rank[np.concatenate(parts[name])])] for name in NAMES if name in parts}


def _labelled(train: list[np.ndarray], data: Data, *, classes: tuple[str, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training images by class whose labels are used (a share of `data.label_budget`), and the remaining ones.

    Raises:
        UserError: there are no labels, or the budget has fewer images than classes.
    """
    counts = _sizes(train)
    total = int(np.floor(data.label_budget * counts.sum() + 0.5))
    if data.label_budget < 1 and not classes:
        raise UserError(f"data.label_budget = {data.label_budget:g} has no effect: no image has a label; set it to 1")
    if total < len(counts):
        raise UserError(
            f"data.label_budget = {data.label_budget:g} leaves {total} of {counts.sum()} training images with a label, and each of "
            f"{len(counts)} classes needs one; it must be at least {len(counts) / counts.sum():.2g}"
        )
    sizes = _allocate(counts, total, counts)
    return _first(train, sizes), [members[size:] for members, size in zip(train, sizes, strict=True)]


def _sizes(groups: list[np.ndarray]) -> np.ndarray:
    return np.array([len(members) for members in groups])


def _first(groups: list[np.ndarray], sizes: np.ndarray) -> list[np.ndarray]:
    return [members[:size] for members, size in zip(groups, sizes, strict=True)]


def _at_most(maximum: int | None, groups: list[np.ndarray], key: str) -> list[np.ndarray]:
    counts = _sizes(groups)
    if maximum is None or maximum >= counts.sum():
        return groups
    if maximum < len(groups):
        raise UserError(f"{key} = {maximum} leaves classes without an image; it must be at least the number of classes, {len(groups)}")
    return _first(groups, _allocate(counts, maximum, counts))


def _allocate(counts: np.ndarray, total: int, limits: np.ndarray) -> np.ndarray:
    """Integers with sum `total`, as close to the proportions of `counts` as `1 <= size <= limits` allows.

    Largest-remainder method: round down, then add one to the class that is furthest below its quota; ties go to the first class.
    """
    quotas = counts * (total / counts.sum())
    sizes = np.clip(np.floor(quotas).astype(np.int64), 1, limits)
    while missing := total - int(sizes.sum()):
        step = 1 if missing > 0 else -1
        movable = sizes < limits if step > 0 else sizes > 1
        sizes[np.argmax(np.where(movable, step * (quotas - sizes), -np.inf))] += step
    return sizes


def _check_enough(counts: np.ndarray, classes: tuple[str, ...], names: list[str]) -> None:
    scarce = np.flatnonzero(counts < len(names))
    if len(scarce):
        first = scarce[0]
        more = f" ({len(scarce)} classes are that small)" if len(scarce) > 1 else ""
        raise UserError(
            f"class '{classes[first]}' has {counts[first]} {'image' if counts[first] == 1 else 'images'}{more}; "
            f"{', '.join(names)} need one each: add images or remove the class"
        )
