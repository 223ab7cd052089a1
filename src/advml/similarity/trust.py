"""Score measures of similarity by known orders, after ReSi (Klabunde et al. 2025), on the study's own data.

In each of ORDERS some pairs of representations are known to be more alike than others. A measure is scored by Somers' D of its
dissimilarity on the known level: the number of concordant minus discordant comparisons, divided by all comparisons of different levels.
1: the measure is never wrong; 0: chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from advml.similarity.cka import Key
from advml.similarity.compare import Comparison
from advml.similarity.represent import CLEAN

# Name of the order -> the known fact.
ORDERS = {
    "label noise": "the same network, trained on labels more of which are random, is less like the one trained on the right ones",
    "training length": "the same network, trained for fewer epochs, is less like the one trained to the end",
    "depth": "blocks of a network that are further apart are less alike",
    "architecture": "networks of one architecture and two seeds are more alike than networks of two architectures",
}


@dataclass(frozen=True)
class Variant:
    """Settings of a network trained for the orders. The reference of a seed has no label noise and the most epochs."""

    architecture: str
    seed: int
    noise: float = 0.0
    epochs: int = 0

    @property
    def name(self) -> str:
        """Name of the network: `test_resnet-s0-noise0.5-8`."""
        return f"{self.architecture}-s{self.seed}-noise{self.noise:g}-{self.epochs}"


def somers_d(levels: Sequence[float], dissimilarity: Sequence[float]) -> float:
    """Somers' D of `dissimilarity` on `levels`, without NaN entries; NaN if fewer than two levels remain."""
    measured = np.isfinite(dissimilarity)
    levels, found = np.asarray(levels, float)[measured], np.asarray(dissimilarity, float)[measured]
    rising = levels[:, None] < levels  # SciPy's function takes minutes for the pairs of forty layers
    return float(np.sign(found - found[:, None])[rising].mean()) if rising.any() else float("nan")


def scores(compared: Comparison, trained: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Scores of every measure in every order: `each` (one per reference; one in all for "architecture") and their `mean`.

    Args:
        compared: similarities of all networks by name, and for the order "depth" a panel of each reference with itself.
        trained: settings of these networks.
    """
    places = {key: place for place, key in enumerate(compared.similarity.norms)}
    full = max(each.epochs for each in trained)
    references = [each for each in trained if each.noise == 0 and each.epochs == full]
    found: dict[str, dict[str, Any]] = {}
    for measure, ends in compared.ends.items():
        each: dict[str, list[float]] = {order: [] for order in ORDERS}
        for reference in references:
            same = [one for one in trained if (one.architecture, one.seed) == (reference.architecture, reference.seed) and one != reference]
            for order, level in (("label noise", lambda one: one.noise), ("training length", lambda one: full - one.epochs)):
                chosen = [one for one in same if level(one)]
                if chosen:
                    each[order].append(
                        somers_d([level(one) for one in chosen], [1 - _value(ends, places, reference, one) for one in chosen])
                    )
        for panel in compared.panels:
            blocks = np.array([row.is_block for row in compared.similarity.rows[panel.first, CLEAN]])
            kept = np.flatnonzero(blocks if blocks.sum() > 3 else compared.counted[panel.first])
            matrix = compared.matrix(panel, CLEAN, measure=measure)[np.ix_(kept, kept)]
            rows, columns = np.nonzero(~np.eye(len(matrix), dtype=bool))
            each["depth"].append(somers_d(np.abs(rows - columns), 1 - matrix[rows, columns]))
        pairs = list(itertools.combinations(references, 2))
        other = [float(one.architecture != second.architecture) for one, second in pairs]
        each["architecture"].append(somers_d(other, [1 - _value(ends, places, *pair) for pair in pairs]))
        found[measure] = {order: {"mean": _mean(values), "each": values} for order, values in each.items()}
    return found


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the finite values (regression on more features than images gives NaN); None if there are none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def _value(ends: np.ndarray, places: Mapping[Key, int], first: Variant, second: Variant) -> float:
    """Similarity of two networks' last layers, averaged over both directions, because regression is not symmetric."""
    one, other = places[first.name, CLEAN], places[second.name, CLEAN]
    return float(ends[one, other] + ends[other, one]) / 2


def table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table, header first: each measure with its mean score per order, the best measure on average first."""
    rows = {name: [about["mean"] for about in orders.values()] for name, orders in found.items()}
    known = {name: [value for value in values if value is not None] or [-1.0] for name, values in rows.items()}
    ranked = sorted(rows, key=lambda name: -np.mean(known[name]))
    return [["measure", *ORDERS], *([name, *("-" if value is None else f"{value:.2f}" for value in rows[name])] for name in ranked)]
