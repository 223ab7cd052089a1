"""`samples.parquet`: results of an evaluation, one row per test image.

| column | |
|---|---|
| index | position in the test split |
| label, predicted | true class, and predicted class of the clean image |
| broken_by | the first attack that changed a correct prediction; `clean`: misclassified already; null: survived all attacks |
| broken_as, distance | predicted class under that attack, and size of the perturbation in the threat model's norm |
| forward, backward | passes spent by the attacks on the image: those of each batch, divided evenly |
| right/<figure> | whether it survived that figure's attack, for figures that attack all images |

The sum of passes over all images is exact, the share of a single image is not: within a batch, library attacks drop some images earlier
than others (Square, as soon as they are broken), or skip queries, without reporting which. Passes of the diagnostics are in their
record.

The file's metadata contain the model, the digests of its weights and of the test images and labels, and the threat model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException
from torch import Tensor

from advml.core.io import reporting_damage, write_atomically
from advml.data.datasets import Split

CLEAN, WORST = "accuracy/clean", "accuracy/worst_case"
METADATA = b"advml"
PASSES = ("forward", "backward")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of one attack for each of the n images attacked.

    Attributes:
        rows: (n,) positions in the split.
        right: (n,) bool, whether the image is still classified correctly.
        predicted: (n,) predicted class of the example that broke the image, else of the clean image; or NOT_FINITE.
        distance: (n,) size of the perturbation that broke it; NaN if it was not broken.
        forward, backward: (n,) passes spent on it: those of its batch, divided evenly.
        images: (m, C, H, W) adversarial versions of the first m images, if they are stored.
    """

    rows: Tensor
    right: Tensor
    predicted: Tensor
    distance: Tensor
    forward: Tensor
    backward: Tensor
    images: Tensor | None = None


def digest_of(split: Split) -> str:
    """sha256 of the pixels and labels of the test split in order, which identifies the images behind the indices."""
    content = hashlib.sha256(split.images.contiguous().numpy())
    content.update(split.labels.contiguous().numpy().tobytes())
    return content.hexdigest()


def table(outcomes: Mapping[str, Outcome], split: Split, *, about: Mapping[str, Any]) -> pa.Table:
    """Table of an evaluation's results; `about` is stored in its metadata."""
    clean = outcomes[CLEAN]
    columns: dict[str, Any] = {
        "index": pa.array(range(len(split.labels)), pa.int64()),
        "label": split.labels.numpy(),
        "predicted": clean.predicted.numpy(),
        **_breaks(outcomes),
        **{name: _spent(outcomes, name) for name in PASSES},
    }
    for name, outcome in outcomes.items():
        if name.startswith("accuracy/"):
            columns[f"right/{name.removeprefix('accuracy/')}"] = outcome.right.numpy()
    metadata = {METADATA: json.dumps(dict(about), sort_keys=True).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def _breaks(outcomes: Mapping[str, Outcome]) -> dict[str, pa.Array]:
    """Columns on the attack that broke each image first, in the order of the attacks."""
    number = len(outcomes[CLEAN].right)
    by = np.full(number, None, dtype=object)
    broken_as, distance = np.full(number, -1), np.full(number, np.nan)
    for name, outcome in outcomes.items():
        rows = outcome.rows[~outcome.right].numpy()
        new = np.equal(by[rows], None)
        by[rows[new]] = name.split("/", 1)[1]
        if name != CLEAN:
            broken_as[rows[new]] = outcome.predicted[~outcome.right].numpy()[new]
            distance[rows[new]] = outcome.distance[~outcome.right].numpy()[new]
    nowhere = np.isnan(distance)
    return {
        "broken_by": pa.array(by, pa.string()),
        "broken_as": pa.array(broken_as, pa.int64(), mask=nowhere),
        "distance": pa.array(distance.astype(np.float32), pa.float32(), mask=nowhere),
    }


def _spent(outcomes: Mapping[str, Outcome], name: str) -> np.ndarray:
    spent = np.zeros(len(outcomes[CLEAN].right), np.float32)
    for outcome in outcomes.values():
        spent[outcome.rows.numpy()] += getattr(outcome, name).numpy()
    return spent


def write(samples: pa.Table, path: Path) -> None:
    """Write the table atomically; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(samples, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def right(samples: pa.Table, figure: str) -> np.ndarray:
    """Mask (N,) of the test images that a figure counts as correct, in the order of the test split.

    Args:
        figure: CLEAN, WORST, or the accuracy under an attack on all images, e.g. `accuracy/threat_model_2`.
    Raises:
        KeyError: the table lacks a column.
        ValueError: the rows are not the N images of a test split, each once.
    """
    index = samples["index"].to_numpy()
    order = np.argsort(index)
    if not np.array_equal(index[order], np.arange(len(index))):
        raise ValueError("its index does not contain every test image once")
    if figure == CLEAN:
        found = samples["predicted"].to_numpy() == samples["label"].to_numpy()
    elif figure == WORST:
        found = samples["broken_by"].is_null().to_numpy()
    else:
        found = samples[f"right/{figure.removeprefix('accuracy/')}"].to_numpy()
    return found[order]


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read the table and its metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    with reporting_damage(path, remedy="measure again with: dvc repro", errors=(ArrowException,)):
        samples = pq.read_table(path)
        return samples, json.loads(samples.schema.metadata[METADATA])
