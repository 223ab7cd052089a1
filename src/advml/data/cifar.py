"""CIFAR-10 and CIFAR-100 in their binary version: plain records, so that no pickle is loaded.

A record is one label byte (CIFAR-100: coarse, then fine), then 3072 bytes of red, green and blue, each 32 x 32
row by row. (Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html)
"""

from __future__ import annotations

import errno
import socket
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np

from advml.config import Data
from advml.data.images import Pixels, fit_arrays
from advml.data.splits import Source
from advml.errors import Failure, UserError
from advml.paths import given_path

PIXELS = 3 * 32 * 32
TIMEOUT = 30  # seconds without an answer, after which the network counts as absent


@dataclass(frozen=True)
class Archive:
    """What the download is called and holds."""

    name: str
    md5: str
    folder: str
    class_names: str
    train: tuple[str, ...]
    test: str
    label_bytes: int  # the last of them is the label
    train_rows: int  # in each of the files of `train`
    test_rows: int

    @property
    def rows(self) -> dict[str, int]:
        return {**dict.fromkeys(self.train, self.train_rows), self.test: self.test_rows}


BASE_URL = "https://www.cs.toronto.edu/~kriz"
CIFAR10 = Archive(
    name="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    class_names="batches.meta.txt",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    label_bytes=1,
    train_rows=10_000,
    test_rows=10_000,
)
CIFAR100 = Archive(
    name="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    class_names="fine_label_names.txt",
    train=("train.bin",),
    test="test.bin",
    label_bytes=2,
    train_rows=50_000,
    test_rows=10_000,
)


def cifar(data: Data, archive: Archive) -> Source:
    """CIFAR below `data.path` (default data/raw), downloaded if it is not there; its test split is kept.

    `data.path` may hold the archive, the extracted folder, or be that folder itself.

    Raises:
        UserError: if it can be neither found nor downloaded; the line says which file to put where.
        Failure: if the disk is full.
    """
    root = given_path(data.path or "data/raw")
    folder = next((place for place in (root, root / archive.folder) if _complete(place, archive)), None)
    if folder is None:
        _fetch(root, archive)
        folder = root / archive.folder
    classes = tuple((folder / archive.class_names).read_text(encoding="utf-8").split())
    batches = [read_records(folder / name, label_bytes=archive.label_bytes, classes=len(classes)) for name in archive.rows]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    train = len(archive.train) * archive.train_rows

    def read(chosen: np.ndarray) -> Pixels:
        return Pixels(fit_arrays(images[chosen], size=data.image_size, channels=data.channels))

    return Source(archive.name, classes, labels, read, {"train": np.arange(train), "test": np.arange(train, len(labels))})


def read_records(path: Path, *, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8, N x 3 x 32 x 32) and labels (int64, N) of one binary file.

    Raises:
        UserError: if the file does not consist of whole records with labels below `classes`.
    """
    values = np.fromfile(path, dtype=np.uint8)
    if len(values) % (label_bytes + PIXELS):
        raise UserError(f"{path} is cut short; delete it and run advml prepare again")
    records = values.reshape(-1, label_bytes + PIXELS)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if (labels >= classes).any():
        raise UserError(f"{path} holds label {labels.max()} of {classes} classes, so it is damaged; delete it and run advml prepare again")
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def _complete(folder: Path, archive: Archive) -> bool:
    """Whether all files are there in full length; an extraction that was killed leaves a short one."""
    sizes = {name: rows * (archive.label_bytes + PIXELS) for name, rows in archive.rows.items()}
    present = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
    return present and (folder / archive.class_names).is_file()


def _fetch(root: Path, archive: Archive) -> None:
    """Download unless an archive with the right checksum lies in `root`, and extract it."""
    from torchvision.datasets.utils import download_and_extract_archive  # costs seconds, needed once

    found = "is incomplete or damaged" if (root / archive.name).exists() else "is missing"
    try:
        with _network_timeout():
            download_and_extract_archive(f"{BASE_URL}/{archive.name}", str(root), md5=archive.md5)
    except (OSError, RuntimeError, HTTPException, EOFError, tarfile.TarError) as error:
        if _is_of_the_disk(error):
            raise Failure(
                f"{root} cannot be written ({error.strerror}); make room there or set data.path, then advml prepare again"
            ) from None
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(
            f"{archive.name} {found} and the download failed ({reason}); put {archive.name} into {root} and run advml prepare again"
        ) from None
    if not _complete(root / archive.folder, archive):
        raise UserError(f"{root / archive.folder} is incomplete; delete it and run advml prepare again")


def _is_of_the_disk(error: Exception) -> bool:
    """A full disk or a folder without the right to write, rather than the network (whose errors are OSErrors as well)."""
    if not isinstance(error, OSError) or isinstance(error, URLError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _network_timeout() -> Iterator[None]:
    """A firewall that swallows packets would otherwise hold the stage for ever: torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
