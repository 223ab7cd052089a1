"""CIFAR-10 and CIFAR-100: find on disk or download, verify, extract and read."""

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
from advml.core.errors import Failure, UserError
from advml.core.io import reporting_damage
from advml.core.paths import given_path
from advml.data.cifar_pickle import read_pickle
from advml.data.splits import Source, stored

# CIFAR-10 and CIFAR-100 in their binary and python versions. (Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html)
#
# Binary: a record is one label byte (CIFAR-100: coarse, then fine), then 3072 bytes of red, green and blue, each 32 x 32
# row by row. Python: pickled dicts with an array of such rows (`data`) and a list of labels, read without unpickling
# (see `cifar_pickle`). Both have the same images in the same order; the binary version is the one that is downloaded.

PIXELS = 3 * 32 * 32
AGAIN = "delete it and run advml prepare again"


@dataclass(frozen=True)
class Archive:
    """Archive of the binary version: its name and content."""

    name: str
    md5: str
    folder: str
    class_names: str
    train: tuple[str, ...]
    test: str
    train_rows: int = 10_000  # in each of the files of `train`
    test_rows: int = 10_000
    label_bytes: int = 1  # the last of them is the label

    @property
    def rows(self) -> dict[str, int]:
        return {**dict.fromkeys(self.train, self.train_rows), self.test: self.test_rows}

    def is_complete(self, folder: Path) -> bool:
        """Whether all files exist in full length; a killed extraction leaves a shorter one."""
        sizes = {name: rows * (self.label_bytes + PIXELS) for name, rows in self.rows.items()}
        present = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
        return present and (folder / self.class_names).is_file()

    def read_classes(self, folder: Path) -> tuple[str, ...]:
        return tuple((folder / self.class_names).read_text(encoding="utf-8").split())

    def read(self, path: Path, *, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (uint8, N x 3 x 32 x 32) and labels (int64, N) of one file.

        Raises:
            UserError: the file does not consist of whole records with labels below `classes`.
        """
        values = np.fromfile(path, dtype=np.uint8)
        if len(values) % (self.label_bytes + PIXELS):
            raise UserError(f"{path} is cut short; {AGAIN}")
        records = values.reshape(-1, self.label_bytes + PIXELS)
        labels = records[:, self.label_bytes - 1].astype(np.int64)
        if (labels >= classes).any():
            raise UserError(f"{path} holds label {labels.max()} of {classes} classes, so it is damaged; {AGAIN}")
        return records[:, self.label_bytes :].reshape(-1, 3, 32, 32), labels


@dataclass(frozen=True)
class PythonArchive(Archive):
    """Archive of the python version; `keys`: the dict keys of class names and of labels."""

    keys: tuple[str, str] = ("label_names", "labels")

    def is_complete(self, folder: Path) -> bool:
        """Whether all files exist, each at least as large as its pixels."""
        sizes = {name: rows * PIXELS for name, rows in self.rows.items()} | {self.class_names: 1}
        return all((folder / name).is_file() and (folder / name).stat().st_size > size for name, size in sizes.items())

    def read_classes(self, folder: Path) -> tuple[str, ...]:
        with reporting_damage(path := folder / self.class_names, remedy=AGAIN):
            return tuple(read_pickle(path.read_bytes())[self.keys[0]])

    def read(self, path: Path, *, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (uint8, N x 3 x 32 x 32) and labels (int64, N) of one file.

        Raises:
            UserError: the file is damaged, or contains anything but plain values and uint8 arrays.
        """
        with reporting_damage(path, remedy=AGAIN):
            content = read_pickle(path.read_bytes())
            pixels, labels = content["data"], np.array(content[self.keys[1]], dtype=np.int64)
            if (pixels.shape, labels.shape) != ((self.rows[path.name], PIXELS), (self.rows[path.name],)):
                raise ValueError(f"{pixels.shape} pixels and {labels.shape} labels")
            if not ((labels >= 0) & (labels < classes)).all():
                raise ValueError(f"labels from {labels.min()} to {labels.max()} of {classes} classes")
            return np.ascontiguousarray(pixels).reshape(-1, 3, 32, 32), labels


CIFAR10 = Archive(
    name="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    class_names="batches.meta.txt",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
)
CIFAR10_PYTHON = PythonArchive(
    name="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    class_names="batches.meta",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
)
CIFAR100 = Archive(
    name="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    class_names="fine_label_names.txt",
    train=("train.bin",),
    test="test.bin",
    train_rows=50_000,
    label_bytes=2,
)
CIFAR100_PYTHON = PythonArchive(
    name="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    class_names="meta",
    train=("train",),
    test="test",
    train_rows=50_000,
    keys=("fine_label_names", "fine_labels"),
)


# Finding, downloading and extracting an archive

BASE_URL = "https://www.cs.toronto.edu/~kriz"
TIMEOUT = 30  # seconds without an answer after which a download fails


def cifar(data: Data, *archives: Archive) -> Source:
    """CIFAR from `data.path` (default data/raw), downloaded if missing; its own test split is used.

    `data.path` may contain an archive or its extracted folder, or be that folder itself.

    Args:
        archives: versions of the same data; the first one is downloaded.
    Raises:
        UserError: it can be neither found nor downloaded; names the file to get and its folder.
        Failure: the disk is full.
    """
    root = given_path(data.path or "data/raw")
    places = [(archive, place) for archive in archives for place in (root, root / archive.folder)]
    archive, folder = next(((archive, place) for archive, place in places if archive.is_complete(place)), None) or _fetch(root, archives)
    classes = archive.read_classes(folder)
    batches = [archive.read(folder / name, classes=len(classes)) for name in archive.rows]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    train = len(archive.train) * archive.train_rows
    return Source(archive.name, classes, labels, stored(images, data), {"train": np.arange(train), "test": np.arange(train, len(labels))})


def _fetch(root: Path, archives: tuple[Archive, ...]) -> tuple[Archive, Path]:
    """Extract an archive in `root` whose checksum is correct, or download the first one; returns the archive and its folder."""
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive  # slow to import, and rarely needed

    damaged = [archive.name for archive in archives if (root / archive.name).exists()]
    try:
        archive = next((one for one in archives if check_integrity(str(root / one.name), one.md5)), archives[0])
        with _network_timeout():
            download_and_extract_archive(f"{BASE_URL}/{archive.name}", str(root), md5=archive.md5)
    except (OSError, RuntimeError, HTTPException, EOFError, tarfile.TarError) as error:
        if _is_of_the_disk(error):
            raise Failure(
                f"{root} cannot be written ({error.strerror}); make room there or set data.path, then advml prepare again"
            ) from None
        reason = " ".join(str(getattr(error, "reason", error)).split())
        found = f"{', '.join(damaged)} is incomplete or damaged" if damaged else f"{archives[0].name} is missing"
        names = " or ".join(archive.name for archive in archives)
        raise UserError(f"{found} and the download failed ({reason}); put {names} into {root} and run advml prepare again") from None
    if not archive.is_complete(root / archive.folder):
        raise UserError(f"{root / archive.folder} is incomplete; {AGAIN}")
    return archive, root / archive.folder


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an OSError is due to a full disk or missing permission, not to the network."""
    if not isinstance(error, OSError) or isinstance(error, URLError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _network_timeout() -> Iterator[None]:
    """Context manager that sets a network timeout; without one, torchvision may wait for ever behind a firewall."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
