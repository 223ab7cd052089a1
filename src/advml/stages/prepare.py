"""`prepare`: images of any source -> uint8 tensors with fixed splits, in `data/prepared/`."""

from __future__ import annotations

import sys
from pathlib import Path

from advml.data import datasets
from advml.errors import UserError
from advml.runtime.checkpoint import write_atomically
from advml.stages.context import Context


def run(context: Context) -> datasets.Dataset:
    """Write `data/prepared/` and print what was found about the pixels; returns the dataset."""
    seen = _fingerprint(context)  # before they are read: what changes meanwhile is a change
    dataset = datasets.prepare(context.config.data)
    datasets.save(dataset, context.workspace.prepared)
    for remark in datasets.remarks(dataset):
        print(f"note: {remark}", file=sys.stderr, flush=True)
    if seen:
        write_atomically(_note(context), f"{seen} {dataset.digest}\n".encode())
    return dataset


def is_current(context: Context) -> bool:
    """Whether `data/prepared/` was made from the `data` section, and from its images, as they stand."""
    try:
        prepared = datasets.load(context.workspace.prepared)
    except UserError:
        return False
    seen = _fingerprint(context)
    same = seen is None or (_note(context).is_file() and _note(context).read_text(encoding="utf-8").split() == [seen, prepared.digest])
    return same and prepared.parameters == context.config.data.model_dump(mode="json")


def _fingerprint(context: Context) -> str | None:
    data = context.config.data
    return datasets.FINGERPRINTS[data.name](data) if data.name in datasets.FINGERPRINTS else None


def _note(context: Context) -> Path:
    """Outside of `data/prepared/`, which DVC hashes: the times of the images differ between machines, the tensors do not."""
    return context.workspace.scratch("prepare") / "source"
