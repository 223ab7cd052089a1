"""Flags: when a robustness figure should not be believed.

    >>> evidence = probe(model, images, labels, threat_model=ThreatModel("linf", 8 / 255), classes=10, steps=50, seed=0)
    >>> [flag.name for flag in flags(evidence)]
    ['curve_above_chance', 'black_box_stronger', 'dead_gradients']

A robust model and one whose gradients lead attacks astray give the same figure. They differ in what `probe` measures, and `rules`
say where the line is. A model without flags may still be weaker than its figure; one with flags has not been attacked properly yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from advml.evaluation.diagnostics import rules
from advml.evaluation.diagnostics.evidence import Evidence
from advml.evaluation.diagnostics.probing import probe

__all__ = ["RULES", "Evidence", "Flag", "flags", "probe"]

# Name of the flag -> its rule.
RULES: tuple[tuple[str, Callable[[Evidence], rules.Finding | None]], ...] = (
    ("curve_not_monotone", rules.curve_not_monotone),
    ("curve_above_chance", rules.curve_above_chance),
    ("single_step_stronger", rules.single_step_stronger),
    ("figure_too_high", rules.figure_too_high),
    ("black_box_stronger", rules.black_box_stronger),
    ("dead_gradients", rules.dead_gradients),
    ("misleading_gradients", rules.misleading_gradients),
    ("loss_still_rising", rules.loss_still_rising),
    ("randomised", rules.randomised),
    ("success_lost", rules.success_lost),
    ("softmax_output", rules.softmax_output),
)


@dataclass(frozen=True)
class Flag:
    """One reason for doubt: what was seen, in numbers, and what to try."""

    name: str
    saw: str
    try_: str

    def as_record(self) -> dict[str, str]:
        """For JSON and tables."""
        return {"name": self.name, "saw": self.saw, "try": self.try_}


def flags(evidence: Evidence) -> list[Flag]:
    """All flags that the evidence raises, in the order of RULES."""
    return [Flag(name, *found) for name, rule in RULES if (found := rule(evidence))]
