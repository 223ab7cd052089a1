"""Coverage and width of 95 % intervals of paired differences of accuracies: the tables of decision 10.

    python docs/decisions/0010-coverage.py --draws 20000 --seed 0

A cell has n test images, the first model's accuracy, how much the second is less accurate, and the correlation of the two over images;
cells that no two models can have are left out. Counts of images are drawn from the multinomial of the cell.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math

import numpy as np
from scipy.special import stdtrit

from advml.evaluation.intervals import wilson
from advml.similarity.estimates import difference, over_seeds, share

Z = 1.959963984540054
SIZES, ACCURACIES, LESS, CORRELATIONS = (100, 360, 1000), (0.5, 0.75, 0.9, 0.97, 0.99), (0, 0.02, 0.1), (0, 0.5, 0.8)
Interval = tuple[float, float]


@functools.cache
def score(agree: int, first: int, second: int) -> Interval:
    """Ours; of two models it is Tango's (1998), which does not ask whether models that agree are right."""
    return difference(*(share(np.repeat(np.array(right, dtype=bool), (agree, first, second))) for right in ([1, 1, 0], [1, 0, 1]))).interval


def newcombe(both: int, first: int, second: int, neither: int) -> Interval:
    """Newcombe (1998), method 10: Wilson's intervals, squared and added, with the continuity-corrected phi."""
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    (low_p, high_p), (low_q, high_q) = wilson(both + first, n), wilson(both + second, n)
    product, cross = (both + first) * (second + neither) * (both + second) * (first + neither), both * neither - first * second
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(product) if product else 0

    def half(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0))

    return p - q - half(p - low_p, high_q - q), p - q + half(high_p - p, q - low_q)


def bonett_price(both: int, first: int, second: int, neither: int) -> Interval:
    """Bonett & Price (2012): Wald's interval with an image added to each of the two discordant counts."""
    n = both + first + second + neither + 2
    p, q = (first + 1) / n, (second + 1) / n
    half = Z * math.sqrt((p + q - (p - q) ** 2) / n)
    return p - q - half, p - q + half


def paired_t(both: int, first: int, second: int, neither: int, *, pseudo: int = 0) -> Interval:
    """The t interval of the mean of the differences; `pseudo` images add to the variance."""
    n = both + first + second + neither
    mean = (first - second) / n
    variance = (first + second - n * mean**2) / (n - 1)
    half = math.sqrt(stdtrit(n - 1, 0.975) ** 2 * variance / n + Z**2 * pseudo / n**2)
    return mean - half, mean + half


METHODS = {
    "score (Tango)": lambda both, first, second, neither: score(both + neither, first, second),
    "Newcombe 10": newcombe,
    "Bonett-Price": bonett_price,
    "paired t": paired_t,
    "paired t with two pseudo-images": lambda *counts: paired_t(*counts, pseudo=2),
}


def two_models(draws: int, seed: int) -> None:
    """Coverage and mean width of every method in every cell."""
    random = np.random.default_rng(seed)
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in METHODS}
    for n, p, less, correlation in itertools.product(SIZES, ACCURACIES, LESS, CORRELATIONS):
        both = p * (p - less) + correlation * math.sqrt(p * (1 - p) * (p - less) * (1 - p + less))
        cell = np.array([both, p - both, p - less - both, 1 - 2 * p + less + both])
        if cell.min() < -1e-12:
            continue
        tables, times = np.unique(random.multinomial(n, cell.clip(0) / cell.clip(0).sum(), draws), axis=0, return_counts=True)
        for name, method in METHODS.items():
            low, high = np.array([method(*map(int, table)) for table in tables]).T
            held = (low - 1e-12 <= less) & (less <= high + 1e-12)
            found[name].append((n, float(times[held].sum()) / draws, float(times @ (high - low)) / draws))
    columns = ["method", *(f"n = {n}" for n in SIZES), "mean", "least", "in 94 to 96", "width"]
    print("|", " | ".join(columns), "|\n|---|" + "---:|" * (len(columns) - 1))
    ours = np.array(found["score (Tango)"])
    for name, rows in found.items():
        sizes, covered, widths = np.array(rows).T
        shares = [*(covered[sizes == n].mean() for n in SIZES), covered.mean(), covered.min(), (abs(covered - 0.95) <= 0.01).mean()]
        print("|", name, "|", " | ".join(f"{100 * share:.1f}" for share in shares), "|", f"{(widths / ours[:, 2]).mean():.3f} |")


def four_models(draws: int, seed: int) -> None:
    """Coverage of a difference of differences: images differ in difficulty, models in skill, and seeds shift the skills."""
    random = np.random.default_rng(seed)
    print("\n| images | accuracies | seeds | coverage | width |\n|---:|---|---:|---:|---:|")
    for n, thresholds, seeds in itertools.product((100, 360, 1000), ((0.9, 0.3, 0.8, 0.6), (4.2, 3.6, 4.0, 4.4)), (1, 3)):
        skills, between, spread = np.array(thresholds), 0.15 * (seeds > 1), math.sqrt(3)
        population = random.normal(0, math.sqrt(4 + between**2), (1_000_000, 1)) < skills
        truth, held, width = float(population.mean(0) @ [1, -1, -1, 1]), 0, 0.0
        for _ in range(draws // 5):
            difficulty, each = random.normal(0, spread, n), []
            for _ in range(seeds):
                skill = skills + between * random.normal(size=4)
                first, second, third, fourth = (share(difficulty + random.normal(size=n) < own) for own in skill)
                each.append(difference(difference(first, second), difference(third, fourth)))
            low, high = over_seeds(each).interval
            held, width = held + (low <= truth <= high), width + high - low
        shown = ", ".join(f".{round(100 * share_right):02d}" for share_right in population.mean(0))
        print(f"| {n} | {shown} | {seeds} | {100 * held / (draws // 5):.1f} | {width / (draws // 5):.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    two_models(given.draws, given.seed)
    four_models(given.draws, given.seed)
