"""Adversarial images that diagnostics come upon. They count in the worst case as those of its own attacks do, after the same scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from advml import config
from advml.attacks.threat import ThreatModel
from advml.data.datasets import Split
from advml.evaluation.measure import Outcome
from advml.evaluation.plan import Figure, threat_of
from advml.evaluation.scoring import Scorer
from advml.runtime.machine import derived_seed, own_randomness

Broken = dict[str, list[Any]]  # rows of the split in rising order, the classes that they are taken for, distances

# What the probes of `diagnostics` are called as steps of the worst case, and what they are; other finds bear the name of their attack.
PROBES = {
    "probe-pgd": "PGD of the security curve, at all its radii up to epsilon",
    "probe-step": "one step of epsilon",
    "probe-noise": "random noise",
}


class Finds:
    """Collects images that are wrong, kind by kind in the order in which they are to count."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, kind: str, rows: Tensor, images: Tensor) -> None:
        """Rows of the split (n,), and their images (n, C, H, W) in the threat model. A kind that has found nothing is noted, too."""
        self.kinds.setdefault(kind, []).append((rows, images))

    def scored(
        self, scorer: Scorer, split: Split, standing: Tensor, threat_model: ThreatModel, *, seed: int, batch_size: int
    ) -> dict[str, Broken]:
        """What of them breaks an image that `standing` (N,) says is left, kind by kind; JSON-able."""
        left, found = standing.clone(), {}
        for kind, parts in self.kinds.items():
            broken: list[tuple[int, int, float]] = []
            pieces = [piece for rows, images in parts for piece in zip(rows.split(batch_size), images.split(batch_size), strict=True)]
            for number, (rows, images) in enumerate(pieces):
                places = left[rows.cpu()].nonzero().squeeze(1)
                if not len(places):
                    continue
                chosen, adversarial = rows.cpu()[places], images[places.to(images.device)]
                with own_randomness(derived_seed("finds", kind, seed, number), images.device):
                    clean = scorer.machine.images(split.images[chosen])
                    predicted, size = (value.cpu() for value in scorer.judge(kind, adversarial, clean, threat_model=threat_model))
                wrong = predicted != split.labels[chosen]
                left[chosen[wrong]] = False
                broken += zip(chosen[wrong].tolist(), predicted[wrong].tolist(), size[wrong].tolist(), strict=True)
            columns = zip(*sorted(broken), strict=True) if broken else ((), (), ())
            found[kind] = dict(zip(("rows", "as", "distances"), map(list, columns), strict=True))
        return found


def outcomes_of(found: Mapping[str, Broken], standing: Tensor, clean: Outcome, *, first: int) -> dict[str, Outcome]:
    """As steps of the cascade: aimed at what all before them have left of the first images. Their passes are in the evidence."""
    left, steps = standing.clone(), {}
    for kind, broken in found.items():
        rows = left[:first].nonzero().squeeze(1)
        right, predicted = ~torch.isin(rows, torch.tensor(broken["rows"], dtype=torch.long)), clean.predicted[rows]
        distance, nothing = torch.full((len(rows),), torch.nan), torch.zeros(len(rows))
        predicted[~right], distance[~right] = torch.tensor(broken["as"], dtype=torch.long), torch.tensor(broken["distances"])
        steps[f"worst_case/{kind}"] = Outcome(rows, right, predicted, distance, nothing, nothing)
        left[rows] = right
    return steps


def figures_of(found: Mapping[str, Broken], threat_model: ThreatModel, spec: config.Diagnostics) -> list[Figure]:
    """The same steps for the record."""
    settings = {"images": spec.images, "steps": spec.steps, "shares": list(spec.shares)}
    about = {**threat_of(threat_model), **settings, "note": "on the images of the diagnostics, which hold its passes"}
    return [Figure(f"worst_case/{kind}", settings={"attack": PROBES.get(kind, kind), **about}, left_only=True) for kind in found]
