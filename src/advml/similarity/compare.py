"""CKA between the layers of different models, on clean and on adversarial images.

The panels of the paper: the schemes against each other under ST and under AT, and AT against Full-AT in each scheme. All models
pass every batch once, however many panels they are in.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from advml import config
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.core.io import read_json
from advml.core.paths import Workspace, model_name
from advml.data.datasets import Split
from advml.models.network import Network
from advml.similarity import represent
from advml.similarity.cka import Similarity, measure
from advml.similarity.layers import Layer, layers
from advml.similarity.represent import KINDS, counted_rows, paired_batches

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


# What is written: matrices and products in cka.npz, layers and how they were measured in cka.json


def arrays(compared: Comparison) -> dict[str, np.ndarray]:
    """What goes into cka.npz: `<first>/<second>/<kind>` (L1, L2), `products/...` per batch, `norms/<model>/<kind>`, `counted/<model>`."""
    similarity = compared.similarity
    found: dict[str, np.ndarray] = {}
    for panel, kind in itertools.product(compared.panels, KINDS):
        name = f"{panel.first}/{panel.second}/{kind}"
        found[name] = compared.cka(panel, kind)
        found[f"products/{name}"] = similarity.products[(panel.first, kind), (panel.second, kind)]
    found |= {f"norms/{model}/{kind}": norm for (model, kind), norm in similarity.norms.items()}
    found |= {f"counted/{model}": counted for model, counted in compared.counted.items()}
    return found | {"sizes": np.array(similarity.sizes)}


@dataclass(frozen=True, eq=False)
class Stored:
    """What the `compare` stage has left: panels, how they were measured (cka.json), and of which weights, by model."""

    compared: Comparison
    described: Mapping[str, Any]
    digests: Mapping[str, str]

    def counted_layers(self, model: str) -> list[str]:
        """Names of the rows of a model that scalars are made of."""
        rows = self.described["layers"][model]
        return [row["name"] for row, counts in zip(rows, self.compared.counted[model], strict=True) if counts]


def stored(workspace: Workspace) -> Stored | None:
    """The panels of the study's grid; None if they have not been measured, or there are none.

    Raises:
        UserError: the files are damaged, or not those of the record.
    """
    folder, path = workspace.reports / "compare", workspace.record("compare", "panels")
    if not path.exists():
        return None
    try:
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(f"{folder} is damaged ({error}); measure again with: advml compare") from None


def read(file: IO[bytes], described: Mapping[str, Any]) -> Comparison:
    """What `arrays` has written; `described` is the content of cka.json beside it."""
    with np.load(file, allow_pickle=False) as stored:
        panels = tuple(Panel(**panel) for panel in described["panels"])
        rows = {
            model: tuple(Layer(**row | {"shape": tuple(row["shape"]), "aliases": tuple(row["aliases"])}) for row in found)
            for model, found in described["layers"].items()
        }
        similarity = Similarity(
            rows={(model, kind): rows[model] for model, kind in itertools.product(rows, KINDS)},
            products={
                ((panel.first, kind), (panel.second, kind)): stored[f"products/{panel.first}/{panel.second}/{kind}"]
                for panel, kind in itertools.product(panels, KINDS)
            },
            norms={(model, kind): stored[f"norms/{model}/{kind}"] for model, kind in itertools.product(rows, KINDS)},
            sizes=tuple(int(size) for size in stored["sizes"]),
        )
        return Comparison(panels, similarity, {model: stored[f"counted/{model}"] for model in rows})


def describe(compared: Comparison) -> dict[str, Any]:
    """What goes into cka.json, beside how it was measured."""
    return {
        "panels": [asdict(panel) for panel in compared.panels],
        "layers": {
            model: [asdict(layer) for layer in rows] for (model, kind), rows in compared.similarity.rows.items() if kind == KINDS[0]
        },
        "batch_sizes": list(compared.similarity.sizes),
    }
