"""CIFAR-10 and CIFAR-100: found on disk or downloaded, checked and extracted."""

from __future__ import annotations

import errno
import socket
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np

from advml.config import Data
from advml.data.cifar_archives import Archive
from advml.data.images import Pixels, fit_arrays
from advml.data.splits import Source
from advml.errors import Failure, UserError
from advml.paths import given_path

BASE_URL = "https://www.cs.toronto.edu/~kriz"
TIMEOUT = 30  # seconds without an answer, after which the network counts as absent


def cifar(data: Data, *archives: Archive) -> Source:
    """CIFAR below `data.path` (default data/raw), downloaded if it is not there; its test split is kept.

    `data.path` may hold an archive, its extracted folder, or be that folder itself.

    Args:
        archives: versions of the same data; the first one is downloaded.
    Raises:
        UserError: it can be neither found nor downloaded; the line says which file to put where.
        Failure: the disk is full.
    """
    root = given_path(data.path or "data/raw")
    places = [(archive, place) for archive in archives for place in (root, root / archive.folder)]
    archive, folder = next(((archive, place) for archive, place in places if archive.is_complete(place)), None) or _fetch(root, archives)
    classes = archive.read_classes(folder)
    batches = [archive.read(folder / name, classes=len(classes)) for name in archive.rows]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    train = len(archive.train) * archive.train_rows

    def read(chosen: np.ndarray) -> Pixels:
        return Pixels(fit_arrays(images[chosen], size=data.image_size, channels=data.channels))

    return Source(archive.name, classes, labels, read, {"train": np.arange(train), "test": np.arange(train, len(labels))})


def _fetch(root: Path, archives: tuple[Archive, ...]) -> tuple[Archive, Path]:
    """Extract an archive in `root` whose checksum is right, or download the first one; returns it and its folder."""
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive  # costs seconds, needed once

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
        raise UserError(f"{root / archive.folder} is incomplete; delete it and run advml prepare again")
    return archive, root / archive.folder


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
