"""The rule by which an effect supports or contradicts what was claimed.

A claim has parts, each a number and a bound, such as "redundancy of AT minus that of ST is above 0".

- A part is `supported` if its whole 95 % interval is on the claimed side of the bound, `contradicted` if the whole
  interval is on the other side, else `inconclusive`. Without an interval (one batch, one image) it is `inconclusive`.
- A part whose models are missing is `not tested`.
- A claim is `not tested` if any part is not; else `contradicted` if any part is; `supported` if all are; else `inconclusive`.

With one seed the interval is over test images alone, so another training, or the same one on another processor, may end in another
verdict: `worded` says "for this seed" in the word itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["supported", "contradicted", "inconclusive", "not tested"]
Side = Literal["above", "below"]


def judge(interval: tuple[float, float] | None, side: Side, bound: float) -> Verdict:
    """The verdict on one part; `interval` None: it could not be tested."""
    if interval is None:
        return "not tested"
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if side == "below":
        low, high, bound = -high, -low, -bound
    if low > bound:
        return "supported"
    return "contradicted" if high < bound else "inconclusive"


def overall(parts: Sequence[Verdict]) -> Verdict:
    """The verdict on a claim from those on its parts."""
    for verdict in ("not tested", "contradicted"):
        if verdict in parts:
            return verdict
    return "supported" if set(parts) == {"supported"} else "inconclusive"


def worded(verdict: Verdict, *, seeds: int) -> str:
    """The verdict as it is written everywhere, e.g. `supported for this seed`; of two seeds and more, `supported`.

    Args:
        seeds: number of trainings that the interval is over.
    """
    return f"{verdict} for this seed" if seeds == 1 and verdict != "not tested" else verdict
