"""Schedules against torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from advml import config
from advml.training.optimization import SCHEDULES, epsilon_share, learning_rate

REPOSITORY = Path(__file__).parents[2]
PEAK = 4e-3


def phase(schedule: str, warmup: float = 0.0) -> config.Phase:
    rest = config.load(REPOSITORY / "params.yaml").regimes["AT"].model_dump()
    return config.Phase(**(rest | {"learning_rate": PEAK, "schedule": schedule, "warmup": warmup}))


def ours(schedule: str, steps: int, warmup: float = 0.0) -> list[float]:
    return [learning_rate(phase(schedule, warmup), step=step, steps=steps) for step in range(steps)]


def torchs(make, steps: int) -> list[float]:
    """Learning rate of each optimiser step under a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < steps:
            scheduler.step()
    return rates


@pytest.mark.parametrize("steps", [2, 11, 165])
def test_onecycle_equals_torchs(steps):
    """Torch counts 30 % of all steps and takes one off; we take 30 % of the way from the first to the last step."""
    share = (0.3 * (steps - 1) + 1) / steps
    expected = torchs(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK, total_steps=steps, pct_start=share), steps)
    assert ours("onecycle", steps) == pytest.approx(expected, rel=1e-9)


def test_onecycle_peaks_within_a_step_of_torchs_default():
    expected = torchs(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK, total_steps=200), 200)
    rates = ours("onecycle", 200)
    assert abs(rates.index(max(rates)) - expected.index(max(expected))) <= 1
    assert max(abs(a - b) for a, b in zip(rates, expected, strict=True)) < 0.02 * PEAK


@pytest.mark.parametrize("steps", [2, 11, 165])
def test_cosine_equals_torchs(steps):
    expected = torchs(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 1), steps)
    assert ours("cosine", steps) == pytest.approx(expected, abs=1e-12)


def test_constant_is_constant():
    assert ours("constant", 7) == [PEAK] * 7


def test_warmup_then_cosine_equals_torchs_sequence_of_both():
    """20 of 100 steps climb linearly; the cosine runs over the 80 that remain."""

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        climb = lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 20)
        return lr_scheduler.SequentialLR(optimizer, [climb, lr_scheduler.CosineAnnealingLR(optimizer, T_max=79)], milestones=[20])

    assert ours("cosine", 100, warmup=0.2) == pytest.approx(torchs(make, 100), abs=1e-12)


def test_warmup_reaches_the_full_rate_and_then_holds_it():
    assert ours("constant", 8, warmup=0.5) == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK, *[PEAK] * 4])


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_rate_lies_between_0_and_the_peak(schedule, warmup, steps):
    rates = ours(schedule, steps, warmup)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in rates) and rates[0] > 0


def shares(warmup: float, steps: int) -> list[float]:
    changed = phase("constant").model_copy(update={"epsilon_warmup": warmup})
    return [epsilon_share(changed, step=step, steps=steps) for step in range(steps)]


def test_the_radius_rises_linearly_and_then_stays():
    assert shares(0.5, 8) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert shares(1.0, 4) == [0.25, 0.5, 0.75, 1.0]
    assert shares(0.3, 10) == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 5), (0.01, 5), (0.2, 1)])
def test_a_rise_of_no_step_is_none(warmup, steps):
    """Exactly 1: the adversary is then the very same."""
    assert shares(warmup, steps) == [1.0] * steps
