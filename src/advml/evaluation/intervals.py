"""Confidence intervals of proportions, and binomial tail probabilities.

For differences between proportions of the same images, see `advml.similarity.statistics.share`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import bdtrc


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927): ((p + z^2/2n) +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Unlike SciPy's function, it accepts numbers that are not integers, which `clustered` needs.
    """
    z, share = 1.959963984540054, successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n)))


def clustered(shares: Sequence[float], *, looks: int) -> tuple[float, float]:
    """95 % interval of a mean accuracy over images that were each classified several times.

    The answers for one image are correlated, so they are not independent trials. Wilson's interval is used with the effective number of
    trials n that gives the observed variance between images: p (1 - p) / n = s^2 / N (Kish 1965; Dean & Pagano 2015,
    doi:10.1093/jssam/smv024). n is N if all answers for an image agree, and at most the number of all answers.

    Args:
        shares: (N,) share of correct answers for each image.
        looks: number of answers per image.
    """
    count, mean = len(shares), math.fsum(shares) / len(shares)
    squares = math.fsum((share - mean) ** 2 for share in shares)
    # If all images have the same share, the correlation is unknown, and n = N.
    alike = squares < 1e-12 * count
    trials = count if alike else min(count * looks, mean * (1 - mean) * count**2 / squares)
    return wilson(mean * trials, trials)


def binomial_tail(successes: int, n: int, *, share: float) -> float:
    """Tail probability P(X >= successes) of a binomial with n trials and 0 < share <= 1.

    With share 1/2 and n the number of disagreeing pairs, it is the p-value of the one-sided sign test.
    """
    return float(bdtrc(successes - 1, n, share)) if successes > 0 else 1.0
