"""Confidence intervals of shares."""

from __future__ import annotations

import math


def wilson(successes: int, n: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927): ((p + z^2/2n) +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n)))
