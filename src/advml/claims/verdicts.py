"""The rule by which an effect supports or contradicts what was claimed.

A claim has parts, each a number and a bound, such as "redundancy of AT minus that of ST is above 0".

- A part is `supported` if its whole 95 % interval is on the claimed side of the bound, `contradicted` if the whole
  interval is on the other side, else `inconclusive`. Without an interval (one batch, one image) it is `inconclusive`.
- A part whose models are missing is `not tested`.
- A claim is `not tested` if any part is not; else `contradicted` if any part is; `supported` if all are; else `inconclusive`.
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
