"""Numbers that claims are made of: an estimate, what it is of, and the conditions under which it was measured.

Two numbers are subtracted, or averaged over seeds, only if their conditions are the same: data, images, batches, layers, attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from advml.similarity import measures, statistics
from advml.similarity.cka import Similarity
from advml.similarity.measures import Scalar
from advml.similarity.statistics import Estimate


class Missing(Exception):
    """A number that a claim needs cannot be had: a model is not trained or measured, or not in the same way as another. Says what to do."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A number. `conditions` by name, None where it is not known. `doubts`: what diagnostics say against it, by model."""

    name: str
    estimate: Estimate
    conditions: Mapping[str, Any]
    doubts: Mapping[str, str] = field(default_factory=dict)


def require_alike(first: Measured | Block, second: Measured | Block) -> None:
    """Raise Missing unless both were measured under the same conditions."""
    for key in first.conditions.keys() | second.conditions.keys():
        ours, theirs = first.conditions.get(key), second.conditions.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise Missing(f"{first.name} and {second.name} were measured with different {key}; measure both again with: dvc repro")


def difference(first: Measured, second: Measured) -> Measured:
    """first - second; errors that both have in common are taken off."""
    require_alike(first, second)
    found = statistics.difference(first.estimate, second.estimate)
    return Measured(f"{first.name} minus {second.name}", found, first.conditions, {**first.doubts, **second.doubts})


def over_seeds(found: Sequence[Measured]) -> Estimate:
    """Mean over seeds, see `statistics.over_seeds`."""
    for other in found[1:]:
        require_alike(found[0], other)
    return statistics.over_seeds([each.estimate for each in found])


@dataclass(frozen=True, eq=False)
class Block:
    """The layers of a model that count, against themselves or against those of another one: what scalars of CKA are made of.

    Attributes:
        first, second: names of models in `similarity`.
        rows, columns: (L1,), (L2,) bool: the layers of each that count.
    """

    name: str
    similarity: Similarity
    first: str
    second: str
    rows: np.ndarray
    columns: np.ndarray
    conditions: Mapping[str, Any]

    def scalar(self, scalar: Scalar, *, chosen: np.ndarray | None = None) -> Measured:
        """A scalar; `chosen` (bool, of the layers that count) leaves out more than the dead ones."""
        found = measures.estimate(self.similarity, scalar, self.first, self.second, rows=self.rows, columns=self.columns, chosen=chosen)
        return Measured(self.name, found, self.conditions)

    def alive(self, scalar: Scalar) -> np.ndarray:
        """Which of the layers that count are alive in the kinds of input that the scalar is of."""
        return measures.living(self.similarity, scalar.keys(self.first, self.second), self.rows, self.columns).alive


def change(after: Block, before: Block, scalar: Scalar) -> Measured:
    """What a scalar has changed by, over the layers that are alive in both."""
    require_alike(after, before)
    both = after.alive(scalar) & before.alive(scalar)
    return difference(after.scalar(scalar, chosen=both), before.scalar(scalar, chosen=both))
