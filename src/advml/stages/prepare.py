"""`prepare`: images of any source -> uint8 tensors with fixed splits, in `data/prepared/`."""

from __future__ import annotations

from advml.data import datasets
from advml.stages.context import Context


def run(context: Context) -> datasets.Dataset:
    """Write `data/prepared/`; returns the dataset."""
    dataset = datasets.prepare(context.config.data)
    datasets.save(dataset, context.workspace.prepared)
    return dataset
