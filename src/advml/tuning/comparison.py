"""Winner and default side by side: two attacks on the same images, or two trainings on further seeds.

Each seed trains both, so the differences d = winner - default are paired. Their mean has the 95 % interval mean +- t * sd / sqrt(S),
with the quantile t of Student's distribution of S - 1 degrees of freedom (Student 1908). One seed has none. The interval is over trainings
alone, on the images at hand.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from advml.evaluation.intervals import wilson

Measured = dict[str, float]  # robust, clean
NOTE = "the winner was chosen on these validation images, which flatters it there; test images had no part in the choice"


def interval(right: np.ndarray) -> dict[str, Any]:
    """Share of right images with its 95 % interval."""
    low, high = wilson(int(right.sum()), len(right))
    return {"accuracy": float(right.mean()), "low": low, "high": high, "n": len(right)}


def compare(scores: Mapping[str, Mapping[str, Sequence[Measured]]], *, floor: float | None) -> dict[str, Any]:
    """What best.yaml tells of the further seeds: of each split the figures of both, their paired differences, and whether the winner is
    more robust by more than noise; None with one seed.

    Args:
        scores: split -> default, winner -> figures, seed by seed.
        floor: least clean validation accuracy; None: there is none.
    """
    told: dict[str, Any] = {"further_seeds": len(scores["validation"]["winner"]), "note": NOTE}
    for split, both in scores.items():
        names = both["winner"][0].keys()
        told[split] = {who: {name: _figure([one[name] for one in seeds]) for name in names} for who, seeds in both.items()}
        pairs = list(zip(both["winner"], both["default"], strict=True))
        found = {name: difference([one[name] - other[name] for one, other in pairs]) for name in names}
        low = found["robust"].get("low")
        told[split] |= {"difference": found, "beats_default": None if low is None else low > 0}
    if floor is not None:
        kept = [measured["clean"] >= floor for measured in scores["validation"]["winner"]]
        told["clean_floor"] = {"floor": floor, "kept": kept, "kept_on_every_seed": all(kept)}
    return told


def difference(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean, and from two on the ends of its 95 % interval."""
    found = _figure(values)
    if (sd := found.pop("sd", None)) is not None:
        half = float(student.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found


def _figure(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean, and from two on their standard deviation."""
    return {"values": list(values), "mean": statistics.mean(values)} | ({"sd": statistics.stdev(values)} if len(values) > 1 else {})
