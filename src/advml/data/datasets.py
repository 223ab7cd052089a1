"""Datasets as uint8 tensors in three fixed splits.

    >>> dataset = prepare(config.data)
    >>> dataset.train.images.shape, dataset.classes[:3]
    (torch.Size([1258, 1, 8, 8]), ('0', '1', '2'))
    >>> save(dataset, "data/prepared")

To add a dataset: a function from the `data` section to a `Source`, a row of DATASETS, and its name in `config.Data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advml.config import Data
from advml.core.errors import UserError
from advml.core.messages import first_of
from advml.core.paths import Workspace
from advml.data import bit_depth, duplicates
from advml.data.cifar import CIFAR10, CIFAR10_PYTHON, CIFAR100, CIFAR100_PYTHON, cifar
from advml.data.image_folder import fingerprint, folder
from advml.data.prepared import UNLABELLED, Dataset, Split, count, digest, load, save
from advml.data.splits import Rows, Source, divide, stored

__all__ = ["DATASETS", "Dataset", "Split", "channel_statistics", "load", "prepare", "remarks", "save"]


def digits(data: Data) -> Source:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8, grey values 0 .. 16 scaled to 0 .. 255.

    Source: Alpaydin and Kaynak 1998, the test part of UCI's optical recognition of handwritten digits.
    """
    from sklearn.datasets import load_digits  # slow to import, and only `prepare` needs it

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(
        "scikit-learn load_digits", tuple(str(name) for name in bunch.target_names), bunch.target.astype(np.int64), stored(images, data)
    )


DATASETS: dict[str, Callable[[Data], Source]] = {
    "digits": digits,
    "cifar10": lambda data: cifar(data, CIFAR10, CIFAR10_PYTHON),
    "cifar100": lambda data: cifar(data, CIFAR100, CIFAR100_PYTHON),
    "folder": folder,
}
# Datasets whose content may change while their parameters do not: a function whose result changes with the content.
FINGERPRINTS: dict[str, Callable[[Data], str | None]] = {"folder": fingerprint}


def prepare(data: Data) -> Dataset:
    """Read the dataset that the `data` section names and divide it.

    Splits are drawn before pixels are read: images beyond `max_train` are never read, and a skipped unreadable image does not change
    the split of any other.

    Raises:
        UserError: the data are missing, cannot be divided, or contain unreadable images while `data.skip_corrupt` is false.
    """
    source = DATASETS[data.name](data)
    parts = divide(source, data)
    chosen = np.concatenate(list(parts.values()))
    pixels = source.read(chosen)
    skipped = tuple(sorted(f"{source.title(chosen[position])}: {reason}" for position, reason in pixels.unreadable.items()))
    if skipped and not data.skip_corrupt:
        raise UserError(_list_unreadable(data, skipped))
    rows = Rows(pixels.images, chosen, np.repeat(np.arange(len(parts)), [len(indices) for indices in parts.values()]))
    rows = rows.keep(~np.isin(np.arange(len(chosen)), list(pixels.unreadable)))
    rows, found = duplicates.treat(rows, source, drop=data.duplicates == "drop")
    splits = rows.divided(source.labels)
    _check_classes(splits, source.classes)
    mean, std = channel_statistics(*(splits[name].images for name in ("train", UNLABELLED) if name in splits))
    return Dataset(
        **splits,
        classes=source.classes,
        source=source.name,
        digest=digest(splits, source.classes),
        mean=mean,
        std=std,
        skipped=skipped,
        ignored=source.ignored,
        remarks=source.remarks if pixels.depth else (*source.remarks, *bit_depth.warning(rows.images)),
        duplicates=found,
        depth=asdict(pixels.depth) if pixels.depth else None,
        parameters=data.model_dump(mode="json"),
    )


def remarks(dataset: Dataset) -> list[str]:
    """Notes for the user on folder, labels, bit depth and duplicates, each starting in lower case and without full stop."""
    white, said = dataset.parameters.get("white_level"), list(dataset.remarks)
    if not dataset.classes:
        said.append("no image has a label: only a scheme that needs none can learn from them, e.g. advml pretrain CL st")
    if dataset.unlabelled:
        said.append(
            f"{len(dataset.train)} training images are labelled; {len(dataset.unlabelled)} are not, and serve CL and the second term of "
            "semi-supervised schemes"
        )
    if dataset.depth:
        said.append(bit_depth.sentence(dataset.depth, chosen=white is not None))
    elif white is not None:
        said.append(f"data.white_level = {white:g} has no effect: no image has more than 8 bits per channel")
    if dataset.duplicates and dataset.duplicates["pictures"]:
        said.append(duplicates.sentence(dataset.duplicates))
    return said


def channel_statistics(*parts: Tensor, batch: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), over all parts together, in [0, 1] units.

    Computed from integer sums, hence exact, equal on every machine, and without a float copy. The deviation of a constant channel is
    set to one grey level, 1/255, so that a model can divide by it.
    """
    batch = batch or max(1, 2**24 // parts[0][0].numel())  # 64 MiB of integers at a time
    total = torch.zeros(parts[0].shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for levels in (some.to(torch.int32) for images in parts for some in images.split(batch)):
        total += levels.sum((0, 2, 3))
        squares += levels.square_().sum((0, 2, 3))
    pixels = sum(images.numel() // images.shape[1] for images in parts)
    sums = list(zip(total.tolist(), squares.tolist(), strict=True))  # Python's integers do not overflow
    mean = tuple(t / pixels / 255 for t, _ in sums)
    std = tuple(max((pixels * s - t * t) ** 0.5 / pixels, 1.0) / 255 for t, s in sums)
    return mean, std


def _check_classes(splits: dict[str, Split], classes: tuple[str, ...]) -> None:
    """Raise UserError if a class has no image left in a split, now that unreadable images and duplicates are left out."""
    for name, split in splits.items():
        numbers = count(split.labels, classes)
        if name != UNLABELLED and 0 in numbers:
            raise UserError(
                f"class '{classes[numbers.index(0)]}' has no image left in {name} after leaving out unreadable images and duplicates; "
                "add images, repair unreadable ones, or remove the class"
            )


def _list_unreadable(data: Data, unreadable: tuple[str, ...], *, shown: int = 3) -> str:
    """Error message that lists unreadable images; a long list is written to a file."""
    paths = [str(Path(data.path or "") / line) for line in unreadable]
    listed = first_of(paths, shown, between="; ")
    if len(paths) > shown:
        report = Workspace().scratch("prepare") / "unreadable.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("\n".join(paths) + "\n", encoding="utf-8", errors="backslashreplace")
        listed += f", listed in {report}"
    plural = "image cannot" if len(paths) == 1 else "images cannot"
    return f"{len(paths)} {plural} be read: {listed}. Repair or remove them, or leave them out with -S data.skip_corrupt=true"
