"""Interleaved timing: what is compared runs in turns, so that a busy moment of the machine hits all of it.

>>> times = interleaved({"ours": ours, "theirs": theirs}, rounds=20)
>>> print(times["ours"].milliseconds, times["theirs"].over(times["ours"]))
1.20 (1.18-1.25) 3.1 (3.0-3.3)
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds, or a ratio of them: the median of all rounds, with the lower and upper quartile."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * samples
        return cls(median, low, high, tuple(samples))

    def over(self, other: Timing) -> Timing:
        """The ratio to another timing of the same call, round by round: what slows a round down cancels out."""
        return Timing.of([mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)])

    def show(self, *, unit: float = 1.0) -> str:
        """`median (low-high)` in multiples of `unit`, to three digits; one number where there is no spread."""
        if self.low == self.high:
            return _three_digits(self.median / unit)
        return "{} ({}-{})".format(*(_three_digits(value / unit) for value in (self.median, self.low, self.high)))

    @property
    def milliseconds(self) -> str:
        return self.show(unit=1e-3)

    def __str__(self) -> str:
        return self.show()


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int, *, warm_up: int = 1) -> dict[str, Timing]:
    """Time every task once per round, forwards and backwards by turns, after `warm_up` rounds that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    for index in range(-warm_up, rounds):
        for name in list(tasks)[:: 1 if index % 2 == 0 else -1]:
            synchronise()
            start = time.perf_counter()
            tasks[name]()
            synchronise()
            if index >= 0:
                samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in samples.items()}


def options(description: str, *, quick: str) -> argparse.ArgumentParser:
    """The options that benchmarks share; `quick`: what --quick makes smaller."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def hardware_line(*packages: str) -> str:
    """Processor, threads and versions, to stand beside every number."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return f"{_processor()}{device}; {torch.get_num_threads()} thread(s); Python {platform.python_version()}, {versions}"


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
