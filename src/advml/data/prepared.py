"""Prepared dataset in memory and on disk.

`data/prepared/` contains `{train,validation,test}.safetensors` with `images` (uint8, N x C x H x W) and `labels` (int64, N; -1: none),
`unlabelled.safetensors` if there are training images without a usable label, and `dataset.json` with everything else. It is written
atomically and without pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from advml.core.errors import Failure, UserError
from advml.core.io import replace_folder, write_atomically

SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"
NAMES = (*SPLITS, UNLABELLED)  # names of all splits that a dataset may have
FILES = frozenset({"dataset.json", *(f"{name}.safetensors" for name in NAMES)})


@dataclass(frozen=True, eq=False)
class Split:
    """Images (uint8, N x C x H x W) and their labels (int64, N); label -1: none."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits, each with every class, and further training images without usable labels.

    Attributes:
        classes: class names; a label is an index into them. Empty: no image has a label.
        source: description of the images' origin.
        digest: sha256 (hex) of class names, shapes, pixels and labels; independent of machine and path.
        mean, std: per channel over the training images, in [0, 1] units.
        skipped: `path: reason` of images that could not be read.
        ignored: number of files that are not images, or are outside of classes.
        remarks: notes for the user, one line each.
        duplicates: images with equal pixels: counts of `duplicates.describe`, `dropped` per split, and `examples`.
        depth: of images with more than 8 bits per channel: `images`, `largest`, `median`, `white_level`.
        parameters: the `data` section from which it was prepared.
        unlabelled: training images without a label, and those beyond the label budget, whose labels must not be used.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    ignored: int = 0
    remarks: tuple[str, ...] = ()
    duplicates: Mapping[str, Any] | None = None  # None: written by an older version, which did not search for duplicates
    depth: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: Split | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """Splits that exist, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.train.images.shape[1:])


def require_labels(dataset: Dataset, reader: str) -> None:
    """Raise UserError if no image has a label; `reader` names the work that needs labels."""
    if not dataset.classes:
        raise UserError(f"{reader} needs labels, and no image of data/prepared has one; sort images by class, or only pretrain CL")


def digest(splits: Mapping[str, Split], classes: tuple[str, ...]) -> str:
    """sha256 (hex) of class names and all tensors (little-endian, so that it is the same on every machine)."""
    total = hashlib.sha256(json.dumps(classes).encode())
    for name in (name for name in NAMES if name in splits):
        split = splits[name]
        total.update(f"{name} {tuple(split.images.shape)}".encode())
        total.update(np.ascontiguousarray(split.images.numpy()))
        total.update(np.ascontiguousarray(split.labels.numpy().astype("<i8")))
    return total.hexdigest()


def save(dataset: Dataset, folder: str | Path) -> None:
    """Write `dataset` into `folder`, replacing an earlier one; a crash leaves the old folder or the new one.

    Raises:
        UserError: `folder` contains files that do not belong to a prepared dataset.
        Failure: the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        foreign = sorted({entry.name for entry in folder.iterdir()} - FILES) if folder.is_dir() else []
        if foreign:
            raise UserError(f"{folder} also contains {foreign[0]}, which is not prepared data; move it away and run advml prepare again")
        with replace_folder(folder) as fresh:
            for name, split in dataset.splits.items():
                save_file({"images": split.images.contiguous(), "labels": split.labels.contiguous()}, fresh / f"{name}.safetensors")
            (fresh / "dataset.json").write_text(json.dumps(_describe(dataset), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise Failure(f"{folder} cannot be written ({_reason(error)}); make room there and run advml prepare again") from None


def load(folder: str | Path, *, verified: Path | None = None) -> Dataset:
    """Load a dataset written by `save`, and verify shapes, types, counts and digest. Images are memory-mapped.

    Args:
        verified: file that lists files whose digest was verified before, by size, time and inode; None: verify all again.
    Raises:
        UserError: the dataset is missing or damaged; names the command that prepares it again.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; make it with: advml prepare")
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        splits = {name: _read_split(folder / f"{name}.safetensors", count, about["shape"]) for name, count in about["counts"].items()}
        _verify(folder, splits, about, verified)
        lists = {key: tuple(about[key]) for key in ("classes", "mean", "std", "skipped")} | {"remarks": tuple(about.get("remarks", ()))}
        plain = {key: about[key] for key in ("source", "digest", "ignored", "parameters")}
        return Dataset(**splits, **lists, **plain, duplicates=about.get("duplicates"), depth=about.get("depth"))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({_reason(error)}); make it again with: advml prepare") from None


def _verify(folder: Path, splits: Mapping[str, Split], about: Mapping[str, Any], verified: Path | None) -> None:
    facts = [about["digest"], about["classes"]]
    for status in (os.stat(folder / f"{name}.safetensors") for name in splits):
        facts.append([status.st_size, status.st_mtime_ns, status.st_ino])
    note = json.dumps(facts).encode()
    if verified and verified.is_file() and verified.read_bytes() == note:
        return
    if digest(splits, tuple(about["classes"])) != about["digest"]:
        raise ValueError("the digest does not match")
    if verified:
        write_atomically(verified, note)


def _read_split(path: Path, count: int, shape: list[int]) -> Split:
    tensors = load_file(path)
    images, labels = tensors["images"], tensors["labels"]
    expected = ((torch.uint8, (count, *shape)), (torch.int64, (count,)))
    if tuple((tensor.dtype, tuple(tensor.shape)) for tensor in (images, labels)) != expected:
        raise ValueError(f"{path.name} does not match dataset.json")
    return Split(images, labels)


def _describe(dataset: Dataset) -> dict[str, Any]:
    per_class = {name: count(split.labels, dataset.classes) for name, split in dataset.splits.items()}
    return {
        "source": dataset.source,
        "digest": dataset.digest,
        "classes": dataset.classes,
        "shape": dataset.shape,
        "counts": {name: len(split) for name, split in dataset.splits.items()},
        "counts_per_class": {name: dict(zip(dataset.classes, counts, strict=True)) for name, counts in per_class.items()},
        "mean": dataset.mean,
        "std": dataset.std,
        "skipped": dataset.skipped,
        "ignored": dataset.ignored,
        "remarks": dataset.remarks,
        "duplicates": dataset.duplicates,
        "depth": dataset.depth,
        "parameters": dict(dataset.parameters),
    }


def count(labels: Tensor, classes: tuple[str, ...]) -> list[int]:
    """Number of images of each class, without unlabelled ones."""
    return torch.bincount(labels[labels >= 0], minlength=len(classes)).tolist()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename else error.strerror
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
