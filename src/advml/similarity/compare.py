"""CKA and other measures between the layers of different models, on clean and on adversarial images.

The paper's panels: pairs of schemes under ST and under AT, and AT with Full-AT in each scheme. Every batch passes each model once,
regardless of the number of panels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from advml import config
from advml.core.io import read_json, reporting_damage
from advml.core.paths import Workspace, model_name
from advml.similarity import alternatives, represent
from advml.similarity.alternatives import Tables
from advml.similarity.cka import Key, Similarity, measure
from advml.similarity.layers import Layer, layers
from advml.similarity.probes import pooled_features
from advml.similarity.represent import CLEAN, KINDS, View, counted_rows, ending_row, further_tables, paired_batches

POOLED = 256  # images per forward pass when only pooled features are needed
SCHEME_PAIRS = (("SCL", "CL"), ("SL", "CL"), ("SL", "SCL"))  # in the order of the paper's figures


@dataclass(frozen=True)
class Panel:
    """A pair of models whose layers are compared. `group` describes the comparison: schemes under AT, ..."""

    group: str
    first: str
    second: str


def paper_panels(grid: config.Grid, seed: int) -> list[Panel]:
    """Panels of the paper that the grid has models for, extended to its other schemes."""
    known = {frozenset(pair) for pair in SCHEME_PAIRS}
    pairs = [*SCHEME_PAIRS, *(pair for pair in itertools.combinations(grid.schemes, 2) if frozenset(pair) not in known)]
    wanted = [
        (f"schemes under {regime}", model_name(first, regime, seed), model_name(second, regime, seed))
        for regime in ("ST", "AT")
        for first, second in pairs
    ] + [("AT against Full-AT", model_name(scheme, "AT", seed), model_name(scheme, "Full-AT", seed)) for scheme in grid.schemes]
    models = {model_name(scheme, regime, seed) for scheme, regime in itertools.product(grid.schemes, grid.regimes)}
    return [Panel(group, first, second) for group, first, second in wanted if {first, second} <= models]


def all_pairs(names: Sequence[str]) -> list[Panel]:
    """Panels of all pairs of models."""
    return [Panel("models", first, second) for first, second in itertools.combinations(names, 2)]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Measured panels.

    Attributes:
        counted: mask, per model, of the rows that are counted in scalars.
        tables: values of measures other than CKA.
        ends: per measure, values (K, K) between the final representations of all models and kinds of input, in the order of
            `similarity.norms`.
    """

    panels: tuple[Panel, ...]
    similarity: Similarity
    counted: Mapping[str, np.ndarray]
    tables: Mapping[str, Tables] = field(default_factory=dict)
    ends: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def distance(self) -> str:
        """Measure that `distances` uses, a key of ANGLES."""
        return next(name for name in ANGLES if name in self.by_measure)

    @property
    def distances(self) -> np.ndarray:
        """Distances (K, K) between the final representations: angles in radians, which fulfil the triangle inequality."""
        return ANGLES[self.distance][1](self.ends[self.distance])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of input."""
        return tuple(dict.fromkeys(kind for _, kind in self.similarity.norms))

    @property
    def by_measure(self) -> dict[str, Similarity | Tables]:
        """All measures, CKA first."""
        return {"cka": self.similarity, **self.tables}

    def matrix(self, panel: Panel, kind: str, *, measure: str = "cka") -> np.ndarray:
        """Values (L1, L2) of a panel; rows are layers of its first model."""
        return self.by_measure[measure].matrix((panel.first, kind), (panel.second, kind))


# Measure with an angle that is a metric -> name of this distance, and its formula.
ANGLES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "shape": ("angular Procrustes distance", lambda values: np.pi / 2 * (1 - values)),
    "cka": ("arccos of CKA", lambda values: np.arccos(np.clip(values, -1, 1))),
}


def compare(
    networks: Mapping[str, nn.Module],
    views: Mapping[Key, View],
    count: int,
    panels: Sequence[Panel],
    spec: config.Similarity,
    *,
    intervals: bool = True,
) -> Comparison:
    """Measure panels in one pass over the images, and a second one for measures other than CKA.

    Args:
        networks: by name; the final representations of all are compared as well.
        views: by model and kind of input: function from indices to versions of the first `count` images.
        intervals: whether measures other than CKA are also computed without each block of images.
    """
    rows = {name: tuple(layers(network, views[name, CLEAN](slice(0, 2)), select=spec.layers)) for name, network in networks.items()}
    lasts = {name: ending_row(found) for name, found in rows.items()}
    kinds = dict.fromkeys(kind for _, kind in views)
    pairs = [((panel.first, kind), (panel.second, kind)) for panel in panels for kind in kinds]
    similarity = measure(networks, rows, paired_batches(views, count, spec), pairs=pairs, gram=spec.gram, ends=lasts)
    tables: dict[str, Tables] = {}
    ends = {"cka": similarity.ends_cka()}
    if set(spec.measures) - {"cka"}:
        places = torch.from_numpy(alternatives.chosen(count)).split(POOLED)
        features = {key: pooled_features(networks[key[0]], rows[key[0]], map(view, places)) for key, view in views.items()}
        tables = further_tables({key: features[key] for pair in pairs for key in pair}, pairs, spec.measures, intervals=intervals)
        ending = {key: [found[lasts[key[0]]]] for key, found in features.items()}
        everyone = [(first, second) for first in ending for second in ending]
        for name, table in further_tables(ending, everyone, spec.measures, intervals=False).items():
            ends[name] = np.array([[table.matrix(first, second)[0, 0] for second in ending] for first in ending])
    return Comparison(tuple(panels), similarity, {name: counted_rows(found) for name, found in rows.items()}, tables, ends)


# Files: matrices and products in cka.npz, layers and method in cka.json


def arrays(compared: Comparison) -> dict[str, np.ndarray]:
    """Content of cka.npz: `<first>/<second>/<kind>` (L1, L2), `products/...` per batch, `norms/<model>/<kind>`, `counted/<model>`.

    For other measures `<measure>/<first>/<second>/<kind>` (1 + B, L1, L2), the values and those without each block of images;
    `ends/<measure>` (K, K).
    """
    similarity = compared.similarity
    found: dict[str, np.ndarray] = {}
    for panel, kind in itertools.product(compared.panels, compared.kinds):
        name, pair = f"{panel.first}/{panel.second}/{kind}", ((panel.first, kind), (panel.second, kind))
        found[name] = compared.matrix(panel, kind)
        found[f"products/{name}"] = similarity.products[pair]
        found |= {f"{measure}/{name}": table.tables[pair] for measure, table in compared.tables.items()}
    found |= {f"norms/{model}/{kind}": norm for (model, kind), norm in similarity.norms.items()}
    found |= {f"counted/{model}": counted for model, counted in compared.counted.items()}
    found |= {f"{measure}/sizes": np.array(table.sizes, dtype=int) for measure, table in compared.tables.items()}
    found |= {f"ends/{measure}": values for measure, values in compared.ends.items()}
    return found | {"sizes": np.array(similarity.sizes)}


@dataclass(frozen=True, eq=False)
class Stored:
    """Stored result of the `compare` stage: panels, method (cka.json), and digests of weights by model."""

    compared: Comparison
    described: Mapping[str, Any]
    digests: Mapping[str, str]

    def counted_layers(self, model: str) -> list[str]:
        """Names of a model's layers that are counted in scalars."""
        rows = self.described["layers"][model]
        return [row["name"] for row, counts in zip(rows, self.compared.counted[model], strict=True) if counts]


def stored(workspace: Workspace) -> Stored | None:
    """Read the stored panels of the study's grid; None if they have not been measured, or there are none.

    Raises:
        UserError: the files are damaged, or do not match the record.
    """
    folder, path = workspace.reports / "compare", workspace.record("compare", "panels")
    if not path.exists():
        return None
    with reporting_damage(folder, remedy="measure again with: advml compare", errors=(BadZipFile,)):
        record, described = (read_json(file, remedy="measure again with: advml compare") for file in (path, folder / "cka.json"))
        if not described["panels"] or record["cka"] is None:
            return None
        found = Stored(read(represent.content(folder / "cka.npz", digest=record["cka"]), described), described, record["digests"])
        if not all(
            {panel.first, panel.second} <= described[key].keys()
            for panel in found.compared.panels
            for key in ("adversarial_source", "data")
        ):
            raise ValueError("models are missing in cka.json")
        return found


def read(file: IO[bytes], described: Mapping[str, Any]) -> Comparison:
    """Inverse of `arrays`; `described` is the content of cka.json beside the file."""
    with np.load(file, allow_pickle=False) as stored:
        panels, kinds = tuple(Panel(**panel) for panel in described["panels"]), described.get("kinds", KINDS)
        rows = {
            model: tuple(Layer(**row | {"shape": tuple(row["shape"]), "aliases": tuple(row["aliases"])}) for row in found)
            for model, found in described["layers"].items()
        }
        pairs = {
            ((panel.first, kind), (panel.second, kind)): f"{panel.first}/{panel.second}/{kind}"
            for panel, kind in itertools.product(panels, kinds)
        }
        similarity = Similarity(
            rows={(model, kind): rows[model] for model, kind in itertools.product(rows, kinds)},
            products={pair: stored[f"products/{name}"] for pair, name in pairs.items()},
            norms={(model, kind): stored[f"norms/{model}/{kind}"] for model, kind in itertools.product(rows, kinds)},
            sizes=tuple(int(size) for size in stored["sizes"]),
        )
        tables = {
            measure: Tables({pair: stored[f"{measure}/{name}"] for pair, name in pairs.items()}, tuple(stored[f"{measure}/sizes"].tolist()))
            for measure in described.get("measures", {}).get("intervals", ())
        }
        return Comparison(panels, similarity, {model: stored[f"counted/{model}"] for model in rows}, tables)


def describe(compared: Comparison) -> dict[str, Any]:
    """Content of cka.json, without the method."""
    return {
        "panels": [asdict(panel) for panel in compared.panels],
        "layers": {
            model: [asdict(layer) for layer in rows] for (model, kind), rows in compared.similarity.rows.items() if kind == KINDS[0]
        },
        "kinds": list(compared.kinds),
        "map": {"distance": ANGLES[compared.distance][0], "points": [list(key) for key in compared.similarity.norms]},
        "batch_sizes": list(compared.similarity.sizes),
        **alternatives.describe(list(compared.tables), sum(compared.similarity.sizes) + compared.similarity.left_out),
    }
