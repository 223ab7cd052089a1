"""CKA between the layers of different models, on clean and on adversarial images.

The panels of the paper: the schemes against each other under ST and under AT, and AT against Full-AT in each scheme. All models
pass every batch once, however many panels they are in.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from advml import config
from advml.data.datasets import Split
from advml.networks.models import Network
from advml.paths import model_name
from advml.runtime.machine import Machine
from advml.similarity.cka import Similarity, measure
from advml.similarity.features import layers
from advml.similarity.representation import KINDS, counted_rows, paired_batches

SCHEME_PAIRS = (("SCL", "CL"), ("SL", "CL"), ("SL", "SCL"))  # in the order of the paper's figures


@dataclass(frozen=True)
class Panel:
    """Layers of one model against those of another. `group` says what is compared: schemes under AT, ..."""

    group: str
    first: str
    second: str


def paper_panels(grid: config.Grid, seed: int) -> list[Panel]:
    """The panels of the paper, as far as the grid has their models."""
    wanted = [
        (f"schemes under {regime}", model_name(first, regime, seed), model_name(second, regime, seed))
        for regime in ("ST", "AT")
        for first, second in SCHEME_PAIRS
    ] + [("AT against Full-AT", model_name(scheme, "AT", seed), model_name(scheme, "Full-AT", seed)) for scheme in ("SL", "CL", "SCL")]
    known = {model_name(scheme, regime, seed) for scheme, regime in itertools.product(grid.schemes, grid.regimes)}
    return [Panel(group, first, second) for group, first, second in wanted if {first, second} <= known]


def all_pairs(names: Sequence[str]) -> list[Panel]:
    """Every model against every other."""
    return [Panel("models", first, second) for first, second in itertools.combinations(names, 2)]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Measured panels. `counted` are the rows of each model that scalars are made of."""

    panels: tuple[Panel, ...]
    similarity: Similarity
    counted: Mapping[str, np.ndarray]

    def cka(self, panel: Panel, kind: str) -> np.ndarray:
        """(L1, L2): rows are layers of the panel's first model."""
        return self.similarity.cka((panel.first, kind), (panel.second, kind))


def compare(
    networks: Mapping[str, Network],
    adversarial: Mapping[str, Tensor],
    panels: Sequence[Panel],
    split: Split,
    spec: config.Similarity,
    machine: Machine,
) -> Comparison:
    """Measure panels in one pass over the images.

    Args:
        networks, adversarial: by name; adversarial images (n, C, H, W) of the first n images of `split`.
    """
    rows = {name: tuple(layers(network, machine.images(split.images[:2]), select=spec.layers)) for name, network in networks.items()}
    pairs = [((panel.first, kind), (panel.second, kind)) for panel in panels for kind in KINDS]
    similarity = measure(networks, rows, paired_batches(dict(adversarial), split, spec, machine), pairs=pairs, gram=spec.gram)
    return Comparison(tuple(panels), similarity, {name: counted_rows(found) for name, found in rows.items()})
