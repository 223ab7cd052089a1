"""Confidence intervals of shares, and how likely a count is by chance."""

from __future__ import annotations

import math


def wilson(successes: int, n: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927): ((p + z^2/2n) +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n)))


def binomial_tail(successes: int, n: int, *, share: float) -> float:
    """P(X >= successes) of a binomial with 0 < share < 1: how likely noise alone gives that many.

    With share 1/2 and n the pairs that disagree it is the one-sided sign test. Summed from logarithms, so that n may be large.
    """
    if successes <= 0:
        return 1.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(share) + (n - k) * math.log1p(-share)
        for k in range(successes, n + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))
