"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Callable

from advml import config


def _cosine(progress: float) -> float:
    """1 -> 0 along half a cosine (Loshchilov & Hutter 2017, eq. 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    """1/25 -> 1 over the first 30 %, then -> 1/250,000, both along cosines (Smith & Topin 2018, torch's defaults)."""
    start, end, peak = 1 / 25, 1 / 25 / 1e4, 0.3
    if progress < peak:
        return 1 + (start - 1) * _cosine(progress / peak)
    return end + (1 - end) * _cosine((progress - peak) / (1 - peak))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "onecycle": _onecycle,
}


def learning_rate(phase: config.Phase, *, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) out of `steps`.

    A linear warm-up over `phase.warmup` of all steps comes first; the schedule runs over the rest.
    """
    warmup = round(phase.warmup * steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return phase.learning_rate * SCHEDULES[phase.schedule](progress)


def epsilon_share(phase: config.Phase, *, step: int, steps: int) -> float:
    """Share of the training radius, and of its step size, that optimiser step `step` (from 0) out of `steps` attacks with.

    It rises linearly over `phase.epsilon_warmup` of all steps and is 1 from then on.
    """
    warmup = round(phase.epsilon_warmup * steps)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
