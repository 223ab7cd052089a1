"""`samples.parquet`: what an evaluation saw of every test image, a row each.

| column | |
|---|---|
| index | place in the test split |
| label, predicted | true class, and the model's on the clean image |
| broken_by | the first attack that changed a right prediction; `clean`: it was wrong already; null: it survived all |
| broken_as, distance | the class it was then taken for, and the size of the perturbation in the threat model's norm |
| forward, backward | passes that the attacks have spent on it: of each batch of an attack, divided evenly |
| right/<figure> | whether it survived that figure's attack, for figures that attack all images |

Within a batch, images leave some attacks of libraries earlier than others (Square, as soon as they are broken), or are left alone where
a query changes nothing, and no library tells which: the sum over all images is exact, the share of a single one is not. Passes of the
diagnostics are in their record.

The file's metadata hold the model, its weights' digest, the digest of the test images and labels, and the threat model.
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

from advml.core.errors import UserError
from advml.core.io import write_atomically
from advml.data.datasets import Split

CLEAN, WORST = "accuracy/clean", "accuracy/worst_case"
METADATA = b"advml"
PASSES = ("forward", "backward")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one figure did to each of the n images that it was aimed at.

    Attributes:
        rows: (n,) places in the split.
        right: (n,) bool, still classified right.
        predicted: (n,) class of the example that broke the image, of the clean image where none did; NOT_FINITE.
        distance: (n,) size of the perturbation that broke it; NaN where none did.
        forward, backward: (n,) passes that the attack has spent on it; of its batch, divided evenly.
        images: (m, C, H, W) adversarial images of the first m, where they are kept.
    """

    rows: Tensor
    right: Tensor
    predicted: Tensor
    distance: Tensor
    forward: Tensor
    backward: Tensor
    images: Tensor | None = None


def digest_of(split: Split) -> str:
    """sha256 over the pixels and labels of the test split, in their order: which images the indices mean."""
    content = hashlib.sha256(split.images.contiguous().numpy())
    content.update(split.labels.contiguous().numpy().tobytes())
    return content.hexdigest()


def table(outcomes: Mapping[str, Outcome], split: Split, *, about: Mapping[str, Any]) -> pa.Table:
    """The table of an evaluation; `about` goes into its metadata."""
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
    """Which attack broke each image first, in the order of the attacks."""
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
    """Store the table, whole or not at all; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(samples, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def right(samples: pa.Table, figure: str) -> np.ndarray:
    """Which test images a figure counts as right: bool (N,), in the order of the test split.

    Args:
        figure: CLEAN, WORST, or the accuracy under an attack on all images, e.g. `accuracy/threat_model_2`.
    Raises:
        KeyError: the table lacks a column.
        ValueError: its rows are not the N images of a test split, each once.
    """
    index = samples["index"].to_numpy()
    order = np.argsort(index)
    if not np.array_equal(index[order], np.arange(len(index))):
        raise ValueError("its index does not name every test image once")
    if figure == CLEAN:
        found = samples["predicted"].to_numpy() == samples["label"].to_numpy()
    elif figure == WORST:
        found = samples["broken_by"].is_null().to_numpy()
    else:
        found = samples[f"right/{figure.removeprefix('accuracy/')}"].to_numpy()
    return found[order]


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and what it is about.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        samples = pq.read_table(path)
        return samples, json.loads(samples.schema.metadata[METADATA])
    except (OSError, ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); measure again with: dvc repro") from None
