"""Read the published CIFAR-10-C and CIFAR-100-C (zenodo.org/records/2535967 and 3555552), if they are on disk.

A corruption is one file, e.g. `fog.npy`: uint8 (5 N, 32, 32, 3), the N test images in CIFAR's order at severities 1 to 5, one after
another. `labels.npy` belongs to all of them. Files are memory-mapped, and never unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advml.config import Corruptions, Data
from advml.core.errors import UserError
from advml.core.paths import given_path
from advml.data.cifar import CIFAR10, CIFAR100
from advml.data.images import Pixels
from advml.data.prepared import Split
from advml.data.splits import Source, divide

SETS = {"cifar10": ("CIFAR-10-C", CIFAR10), "cifar100": ("CIFAR-100-C", CIFAR100)}
BLOCKS = 5  # number of severities in a file


@dataclass(frozen=True, eq=False)
class Published:
    """Published files of one dataset.

    Attributes:
        folder: of the files.
        rows: for each image of the prepared test split, its index among the N images of a severity.
    """

    folder: Path
    rows: np.ndarray

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").exists()

    def read(self, name: str, severity: int) -> Split:
        """Corrupted test split: the same images in the same order."""
        images, labels = read_block(self.folder, name, severity)
        return Split(images[self.rows], labels[self.rows])


def find(data: Data, spec: Corruptions) -> Published | None:
    """Find the published files of this dataset; None if they are not on disk, so that corruptions are computed.

    Raises:
        UserError: `corruptions.folder` does not exist or does not match the data, or labels.npy is missing or damaged.
    """
    folder = _folder(data, spec)
    if folder is None:
        return None
    labels = _labels(folder)
    test, (_, archive) = labels[: len(labels) // BLOCKS], SETS[data.name]
    # Repeats the split of `prepare`; the test split depends on the number of training images, not on their content.
    train = len(archive.train) * archive.train_rows
    classes = int(test.max()) + 1
    known = np.concatenate([np.arange(train) % classes, test])
    given = {"train": np.arange(train), "test": np.arange(train, len(known))}
    source = Source(archive.name, tuple(map(str, range(classes))), known, Pixels, given)
    return Published(folder, divide(source, data)["test"] - train)


def _folder(data: Data, spec: Corruptions) -> Path | None:
    whole = data.duplicates == "keep"  # else duplicates may be missing among the test images
    fits = data.name in SETS and data.image_size in (None, 32) and data.channels in (None, 3) and whole
    if spec.folder is None:
        usual = given_path(data.path or "data/raw") / SETS[data.name][0] if fits else None
        return usual if usual and usual.is_dir() else None
    if not fits:
        raise UserError(
            f"corruptions.folder = {spec.folder!r} cannot be used: published files exist only for {', '.join(SETS)} "
            "in colour at 32 pixels, and need data.duplicates = keep; set it to null"
        )
    folder = given_path(spec.folder)
    if not folder.is_dir():
        raise UserError(f"corruptions.folder = {spec.folder!r} does not exist; set it to null to have corruptions computed")
    return folder


def read_block(folder: Path, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """Images (uint8, N x 3 x 32 x 32) and labels (int64, N) of a corruption at one severity.

    Raises:
        UserError: a file is damaged or has another format, or labels.npy is missing.
    """
    path = folder / f"{name}.npy"
    images, labels = _read(path), _labels(folder)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or not len(images) or len(images) % BLOCKS:
        raise _damaged(path, f"it holds {images.dtype} {images.shape}, not uint8 (5 N, 32, 32, 3)")
    if len(labels) != len(images):
        raise _damaged(folder / "labels.npy", f"it holds {len(labels)} labels for {len(images)} images")
    size = len(images) // BLOCKS
    block = slice((severity - 1) * size, severity * size)
    chosen = np.ascontiguousarray(np.moveaxis(images[block], -1, 1))
    return torch.from_numpy(chosen), torch.from_numpy(labels[block].astype(np.int64))


def _labels(folder: Path) -> np.ndarray:
    labels = _read(folder / "labels.npy")
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or len(labels) % BLOCKS:
        raise _damaged(folder / "labels.npy", f"it holds {labels.dtype} {labels.shape}, not whole numbers (5 N,)")
    return labels


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # truncated, not a .npy file, or pickled objects
        raise _damaged(path, getattr(error, "strerror", None) or " ".join(str(error).split())) from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be used ({reason}); unpack the download again, or move the folder away to have corruptions computed")
