"""Confidence intervals of shares, and how likely a count is by chance.

Of a difference of shares of the same images: `advml.similarity.statistics.share`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import bdtrc


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927): ((p + z^2/2n) +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Numbers need not be whole, as SciPy's must be: see `clustered`.
    """
    z, share = 1.959963984540054, successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n)))


def clustered(shares: Sequence[float], *, looks: int) -> tuple[float, float]:
    """95 % interval of a mean over images, each of which was looked at several times.

    Looks at one image are correlated, so they are no independent trials. Wilson's interval is taken of as many trials n as would
    have the variance that the images show: p (1 - p) / n = s^2 / N (Kish 1965; Dean & Pagano 2015, doi:10.1093/jssam/smv024).
    n is N where the looks at an image all agree, and at most the number of all looks, as if they were independent.

    Args:
        shares: for each of N images, its share of right answers.
        looks: at each image.
    """
    count, mean = len(shares), math.fsum(shares) / len(shares)
    squares = math.fsum((share - mean) ** 2 for share in shares)
    # If all images have the same share, the correlation is unknown: the N images are the trials.
    alike = squares < 1e-12 * count
    trials = count if alike else min(count * looks, mean * (1 - mean) * count**2 / squares)
    return wilson(mean * trials, trials)


def binomial_tail(successes: int, n: int, *, share: float) -> float:
    """P(X >= successes) of a binomial with 0 < share <= 1: how likely chance alone gives that many.

    With share 1/2 and n the pairs that disagree it is the one-sided sign test.
    """
    return float(bdtrc(successes - 1, n, share)) if successes > 0 else 1.0
