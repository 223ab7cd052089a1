"""Check images and labels in memory, and convert them to the form of a prepared dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from advml.core.errors import UserError
from advml.data.datasets import Dataset, Split, channel_statistics
from advml.data.prepared import digest

Batches = Iterable[Any]  # of images, or of (images, labels, ...), such as a DataLoader
Labelled = tuple[Tensor, Tensor] | Batches  # (images, labels), or batches of them


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(otherwise)


def checked(images: Tensor, labels: Tensor | None = None, *, of: str = "") -> Split:
    """Check images (N, C, H, W) and labels (N,), and return them as a split on the CPU.

    Images become uint8 if all values are grey levels; missing labels become zeros.

    Args:
        of: name of the pair, for messages.
    Raises:
        UserError: shapes or types do not match, or values are out of range.
    """
    these = f"{of}: " if of else ""
    require(isinstance(images, Tensor), f"{these}images must be a tensor, not {type(images).__name__}")
    require(images.ndim == 4 and len(images) > 0, f"{these}images must be (N, C, H, W) with N at least 1, not {tuple(images.shape)}")
    last = images.shape[3] in (1, 3, 4) and min(images.shape[1:3]) > 4
    require(not last, f"{these}images are {tuple(images.shape)}, with channels last; give images.permute(0, 3, 1, 2), (N, C, H, W)")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        require(images.is_floating_point(), f"{these}images are {images.dtype}; give floats in [0, 1], or uint8")
        images = images.float()
        low, high = float(images.min()), float(images.max())
        require(low >= 0 and high <= 1, f"{these}images range from {low:g} to {high:g}; give them in [0, 1], before any normalisation")
        levels = (255 * images).round()
        if torch.equal(levels / 255, images):
            images = levels.to(torch.uint8)
    if labels is None:
        return Split(images, torch.zeros(len(images), dtype=torch.int64))
    kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex() or kind == torch.bool)
    require(whole, f"{these}labels must be a tensor of whole numbers, not {kind}")
    require(labels.shape == images.shape[:1], f"{these}labels must be one class per image, ({len(images)},), not {tuple(labels.shape)}")
    labels = labels.detach().cpu().long()
    require(int(labels.min()) >= 0, f"{these}the smallest label is {int(labels.min())}; classes are numbered from 0")
    return Split(images, labels)


def labelled(images: Tensor | Batches, labels: Tensor | None = None, *, of: str = "") -> Split:
    """Checked split from tensors, or from batches of (images, labels)."""
    these = f"{of}: " if of else ""
    if isinstance(images, Tensor):
        require(labels is not None, f"{these}labels are missing; give (images, labels), or batches of them")
        return checked(images, labels, of=of)
    wanted = f"{these}images must be a tensor, not {type(images).__name__}, or batches of (images, labels)"
    require(labels is None, f"{wanted} without further labels")
    batches = list(images) if isinstance(images, Iterable) else []
    pairs = all(isinstance(batch, Sequence) and len(batch) >= 2 and all(isinstance(one, Tensor) for one in batch[:2]) for batch in batches)
    require(bool(batches) and pairs, wanted)
    for number, (some, classes, *_) in enumerate(batches):
        where = f"{these}batch {number}"
        require(some.shape[:1] == classes.shape[:1], f"{where}: {tuple(some.shape)} images, but {tuple(classes.shape)} labels")
        same = some.shape[1:] == batches[0][0].shape[1:]
        require(same, f"{where}: images are {tuple(some.shape[1:])}, but in batch 0 {tuple(batches[0][0].shape[1:])}")
    return checked(torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches]), of=of)


def pair(given: Labelled, *, of: str) -> Split:
    """Checked split from a pair (images, labels), or from batches of such pairs."""
    two = isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], Tensor)
    return labelled(*given, of=of) if two else labelled(given, of=of)  # type: ignore[misc]


def images_of(images: Tensor | Batches, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of images: from a tensor, or the first element of each given batch."""
    if isinstance(images, Tensor):
        require(isinstance(batch_size, int) and batch_size >= 1, f"batch_size = {batch_size!r} must be a whole number, at least 1")
        yield from checked(images).images.split(batch_size)
    else:
        yield from (checked(batch if isinstance(batch, Tensor) else batch[0]).images for batch in images)


def dataset_of(train: Split, validation: Split, classes: Sequence[str]) -> Dataset:
    """Dataset of two splits; the validation split also fills the place of the test split, which training does not use."""
    names, largest = tuple(classes), int(max(train.labels.max(), validation.labels.max()))
    require(largest < len(names), f"label {largest} is out of range: there are {len(names)} classes, numbered from 0")
    levels = train.images if train.images.dtype == torch.uint8 else (255 * train.images).round().to(torch.uint8)
    mean, std = channel_statistics(levels)
    found = digest({"train": train, "validation": validation, "test": validation}, names)
    return Dataset(train, validation, validation, classes=names, source="tensors", digest=found, mean=mean, std=std)
