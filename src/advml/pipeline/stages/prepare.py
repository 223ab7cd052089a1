"""`prepare`: images of any source -> uint8 tensors with fixed splits, in `data/prepared/`."""

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
    """Write `data/prepared/` and print what a user may not expect of the data; returns the dataset.

    Raises:
        UserError: the data cannot be read, or `data.path` overlaps with what the study writes.
    """
    _check_place(context)
    seen = _fingerprint(context)  # before they are read: what changes meanwhile is a change
    dataset = datasets.prepare(context.config.data)
    datasets.save(dataset, context.workspace.prepared)
    for remark in datasets.remarks(dataset):
        tell(f"note: {remark}")
    write_atomically(_note(context), f"{seen} {source_digest('prepare')} {dataset.digest}\n".encode())
    return dataset


def is_current(context: Context) -> bool:
    """Whether `data/prepared/` was made from the `data` section, its images and the sources as they stand.

    Where there are no images to look at, or no note of them, as after `dvc pull`, what is left decides.
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
    """Else the figures of reports would be images, and `.` a data set of folders called `src` and `docs`."""
    data = context.config.data
    if data.name != "folder" or not os.path.isdir(given := given_path(data.path)):
        return
    place = Path(os.path.realpath(given))
    for ours in (Path(os.path.realpath(path)) for path in context.workspace.written):
        if place.is_relative_to(ours) or ours.is_relative_to(place):
            relation = "lies in" if place.is_relative_to(ours) else "holds"
            raise UserError(
                f"data.path = '{data.path}' {relation} {ours}, which the study writes; give the images a folder of their own, e.g. photos"
            )


def _fingerprint(context: Context) -> str | None:
    data = context.config.data
    return datasets.FINGERPRINTS[data.name](data) if data.name in datasets.FINGERPRINTS else None


def _note(context: Context) -> Path:
    """Outside of `data/prepared/`, which DVC hashes: the times of the images differ between machines, the tensors do not."""
    return context.workspace.scratch("prepare") / "source"
