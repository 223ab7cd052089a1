"""Stage `prepare`: convert the dataset to uint8 tensors with fixed splits, in `data/prepared/`."""

from __future__ import annotations

import os
from pathlib import Path

from advml.core.errors import UserError
from advml.core.io import write_atomically
from advml.core.messages import tell
from advml.core.paths import given_path
from advml.core.provenance import source_digest
from advml.data import datasets
from advml.pipeline.context import Context


def run(context: Context) -> datasets.Dataset:
    """Write `data/prepared/`, and print notes on the data; returns the dataset.

    Raises:
        UserError: the data cannot be read, or `data.path` overlaps with folders that the study writes.
    """
    _check_place(context)
    seen = _fingerprint(context)  # before reading, so that changes during it are noticed later
    dataset = datasets.prepare(context.config.data)
    datasets.save(dataset, context.workspace.prepared)
    for remark in datasets.remarks(dataset):
        tell(f"note: {remark}")
    write_atomically(_note(context), f"{seen} {source_digest('prepare')} {dataset.digest}\n".encode())
    return dataset


def is_current(context: Context) -> bool:
    """Whether `data/prepared/` was made from the present `data` section, images and sources.

    If the images or their stored fingerprint are missing, as after `dvc pull`, images are not compared.
    """
    try:
        prepared = datasets.load(context.workspace.prepared, verified=context.workspace.verified)
    except UserError:
        return False
    if prepared.parameters != context.config.data.model_dump(mode="json"):
        return False
    seen = _fingerprint(context)
    try:
        noted, *others = _note(context).read_text(encoding="utf-8").split()
    except (FileNotFoundError, ValueError):
        return seen is None
    return others == [source_digest("prepare"), prepared.digest] and seen in (None, noted)


def _check_place(context: Context) -> None:
    """Refuse a data.path that overlaps with folders that the study writes, whose pictures would become training images."""
    data = context.config.data
    if data.name != "folder" or not os.path.isdir(given := given_path(data.path)):
        return
    place = Path(os.path.realpath(given))
    for ours in (Path(os.path.realpath(path)) for path in context.workspace.written):
        if place.is_relative_to(ours) or ours.is_relative_to(place):
            relation = "is inside of" if place.is_relative_to(ours) else "contains"
            raise UserError(
                f"data.path = '{data.path}' {relation} {ours}, which the study writes; give the images a folder of their own, e.g. photos"
            )


def _fingerprint(context: Context) -> str | None:
    data = context.config.data
    return datasets.FINGERPRINTS[data.name](data) if data.name in datasets.FINGERPRINTS else None


def _note(context: Context) -> Path:
    """File of the images' fingerprint, outside of `data/prepared/`, which DVC hashes, because file times differ between machines."""
    return context.workspace.scratch("prepare") / "source"
