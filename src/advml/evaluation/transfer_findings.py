"""What a transfer says: accuracies with their intervals, and flags.

Images that survive all of a model's own attacks and that another model's adversarial examples break are images that the white-box attacks
have missed: a sign of masked gradients (Athalye et al. 2018, sec. 3.1). A few of them are none: every attack stops short of some images
near the boundary, more so the fewer attacks there were, and models that share an encoder attack one another almost as themselves. PGD of 20
steps alone leaves up to 2 % on the honest models of digits, none of which this rule flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from advml.evaluation.diagnostics.flags import Flag
from advml.evaluation.diagnostics.rules import SIGNIFICANCE, TOLERATED
from advml.evaluation.intervals import binomial_tail, wilson
from advml.evaluation.transfer import Transfer

FLAG = "transfer_stronger"
FEWEST = 3  # images; one or two are an anecdote, however few survive
RULE = (
    f"A model is flagged where adversarial images of others break at least {FEWEST} of the images that survive all of its own attacks, and "
    f"more than chance makes of {100 * TOLERATED:g} % of them (binomial tail below {SIGNIFICANCE:g}): every attack stops short of a few."
)


@dataclass(frozen=True)
class Breaks:
    """Of one target.

    Attributes:
        survived: images that some source has attacked and that survive all of the target's own attacks.
        broken: how many of them the examples of any source break.
        sources: how many of them those of each source break, most first; without those that break none.
    """

    target: str
    survived: int
    broken: int
    sources: dict[str, int]

    @property
    def flag(self) -> Flag | None:
        """Raised under RULE."""
        if self.broken < FEWEST or binomial_tail(self.broken, self.survived, share=TOLERATED) >= SIGNIFICANCE:
            return None
        listed = ", ".join(f"{name} {count}" for name, count in self.sources.items())
        return Flag(
            FLAG,
            f"adversarial images of other models break {self.broken} of {self.survived} images that survive all of its own attacks: "
            f"{listed}",
            "the worst case is at most what those images leave; attack harder (the whole cascade, more restarts and steps), also from them",
        )


def breaks(found: Transfer, target: int) -> Breaks:
    """Of the target with this number. Only sources whose attack had the norm and epsilon of the target's evaluation count."""
    model = found.models[target]
    survived, broken = torch.zeros_like(model.survived), torch.zeros_like(model.survived)
    counts = {}
    for source, attack, row in zip(found.models, found.attacks, found.right, strict=True):
        if source is model or not _same((attack["norm"], attack["epsilon"]), model.threat):
            continue
        n = len(row[target])
        by_source = model.survived[:n] & ~row[target]
        survived[:n] |= model.survived[:n]
        broken[:n] |= by_source
        counts[source.name] = int(by_source.sum())
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return Breaks(model.name, int(survived.sum()), int(broken.sum()), {name: count for name, count in most_first if count})


def _same(first: tuple[str, float], second: tuple[str, float]) -> bool:
    return first[0] == second[0] and math.isclose(first[1], second[1], rel_tol=1e-6)


def describe(found: Transfer, *, seed: int) -> dict[str, Any]:
    """One seed. `accuracy`, `correct` and `intervals` (95 % Wilson) are indexed [source][target], `n` and `attacks` by source."""
    correct = [[int(right.sum()) for right in row] for row in found.right]
    n = [len(row[0]) for row in found.right]
    broken = [breaks(found, target) for target in range(len(found.models))]
    return {
        "seed": seed,
        "models": [model.name for model in found.models],
        "digests": {model.name: model.digest for model in found.models},
        "n": n,
        "correct": correct,
        "accuracy": [[count / of for count in row] for row, of in zip(correct, n, strict=True)],
        "intervals": [[list(wilson(count, of)) for count in row] for row, of in zip(correct, n, strict=True)],
        "clean": [float(model.clean[: max(n)].double().mean()) for model in found.models],
        "attacks": list(found.attacks),
        "breaks": [
            {"model": one.target, "survived": one.survived, "transfer_breaks": one.broken, "sources": one.sources} for one in broken
        ],
        "flags": [{"model": one.target, **one.flag.as_record()} for one in broken if one.flag],
    }
