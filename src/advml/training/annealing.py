"""DynACL's schedules (Luo et al. 2023, sec. 4): every K of T epochs, views weaken and the adversarial weight rises; epochs count from 1."""

from __future__ import annotations

from advml import config


def view_strength(period: int | None, *, epoch: int, epochs: int) -> float:
    """Strength of views s = 1 - floor((e - 1) / K) K / T in epoch e; 1 without a period K."""
    return 1 - (epoch - 1) // period * period / epochs if period else 1.0


def term_weights(phase: config.Phase, *, epoch: int, epochs: int) -> tuple[float, float]:
    """Weights of the clean and the adversarial term: (2 - w) / 2 and w / 2, w = min(1 + 2/3 floor(e / K) K / T, 2); or constants."""
    if not (period := phase.weight_annealing):
        return phase.clean_weight, phase.adversarial_weight
    weight = min(1 + 2 / 3 * (epoch // period) * period / epochs, 2)
    return (2 - weight) / 2, weight / 2
