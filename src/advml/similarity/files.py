"""What is written of a measured representation: scalars as metrics, arrays for cka.npz, and how it was measured, for cka.json."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from advml import config
from advml.errors import UserError
from advml.evaluation.intervals import wilson
from advml.similarity import probes, summary
from advml.similarity.cka import Similarity
from advml.similarity.estimates import FEWEST_BATCHES
from advml.similarity.features import Layer
from advml.similarity.representation import ESTIMATOR, KINDS, MATRICES, MODEL, Representation

# Of cka.json, what the record repeats: how the figures were made, and what must be the same before models are compared.
HOW = (
    "estimator",
    "gram",
    "n",
    "batch_sizes",
    "intervals",
    "counted_in_scalars",
    "last_layer",
    "dead_layers",
    "adversarial_source",
)


def metrics(measured: Representation) -> dict[str, float]:
    """Flat metrics: `cka/<scalar>`, `cka/rankme`, `probe/<clean|adversarial>`, each with /low and /high; NaN where there is no value.

    RankMe and the probe are of the last recorded layer of the encoder. Intervals: jackknife over batches, for probes Wilson.
    """
    flat: dict[str, float] = {}
    for name, scalar in summary.SCALARS.items():
        found = summary.estimate(measured.similarity, scalar, MODEL, MODEL, rows=measured.counted, columns=measured.counted)
        flat |= _with_interval(f"cka/{name}", found.value, found.interval)
    value, *interval = measured.rankme
    flat |= _with_interval("cka/rankme", value, interval)
    last = measured.probes[measured.last]
    for kind in KINDS:
        flat |= _with_interval(f"probe/{kind}", last.accuracy[kind], wilson(last.correct[kind], measured.tested))
    return flat


def _with_interval(name: str, value: float, interval: Any) -> dict[str, float]:
    low, high = interval
    return {name: value, f"{name}/low": low, f"{name}/high": high}


def arrays(measured: Representation) -> dict[str, np.ndarray]:
    """What goes into cka.npz."""
    products = measured.similarity.products
    return (
        {name: measured.cka(*pair) for name, pair in MATRICES.items()}
        | {f"products_{name}": products[(MODEL, first), (MODEL, second)] for name, (first, second) in MATRICES.items()}
        | {f"norms_{kind}": measured.similarity.norms[MODEL, kind] for kind in KINDS}
        | {"sizes": np.array(measured.similarity.sizes), "counted": measured.counted}
    )


# Of the record of an attack, what it was; the rest says what came of it.
SETTINGS = (
    *("attack", "objective", "norm", "epsilon", "box", "steps", "step_size", "random_start", "keep", "mode", "seed", "batch_size"),
    *("images", "shares"),  # of the diagnostics' probes
)


def settings(attack: Mapping[str, Any]) -> dict[str, Any]:
    """How adversarial images were made, from their record; of clean ones nothing."""
    return {key: attack[key] for key in SETTINGS if key in attack}


def content(path: Path, *, digest: str | None) -> io.BytesIO:
    """A file whose sha256 stands in a record.

    Raises:
        UserError: it is missing, or another one: a stage was killed between file and record, or the file was changed since.
    """
    try:
        found = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); measure again with: dvc repro") from None
    if hashlib.sha256(found).hexdigest() != digest:
        raise UserError(f"{path} is not the file that its record tells of; measure again with: dvc repro, or advml represent and compare")
    return io.BytesIO(found)


def read(path: Path, *, digest: str | None) -> tuple[Similarity, np.ndarray]:
    """The similarity in a cka.npz, whose model is called MODEL, and the rows that count in scalars, (L,) bool.

    Args:
        digest: its sha256, from the record.
    Raises:
        UserError: the file is missing, damaged or another one.
    """
    try:
        with np.load(content(path, digest=digest), allow_pickle=False) as stored:
            products = {((MODEL, first), (MODEL, second)): stored[f"products_{name}"] for name, (first, second) in MATRICES.items()}
            norms = {(MODEL, kind): stored[f"norms_{kind}"] for kind in KINDS}
            return Similarity({}, products, norms, tuple(stored["sizes"].tolist())), stored["counted"]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); measure again with: dvc repro") from None


def describe(measured: Representation, spec: config.Similarity, *, of: dict[str, Any], attack: dict[str, Any]) -> dict[str, Any]:
    """What goes into cka.json: layers, probes, and how it was measured.

    Args:
        of: `model`, `digest` of its weights.
        attack: the record of the adversarial images.
    """
    batches = len(measured.similarity.sizes)
    none = f"none: {batches} batches of test images, and an interval needs {FEWEST_BATCHES}" if batches < FEWEST_BATCHES else None
    diagonals = {kind: measured.similarity.norms[MODEL, kind].sum(0) for kind in KINDS}
    return {
        **of,
        "layers": [_row(layer, probe) for layer, probe in zip(measured.layers, measured.probes, strict=True)],
        "counted_in_scalars": [layer.name for layer, yes in zip(measured.layers, measured.counted, strict=True) if yes],
        "last_layer": measured.layers[measured.last].name,
        "dead_layers": {
            kind: [layer.name for layer, norm in zip(measured.layers, norms, strict=True) if not norm > 0]
            for kind, norms in diagonals.items()
        },
        "estimator": ESTIMATOR,
        "gram": spec.gram,
        "inputs": f"the first {measured.tested} test images, clean and attacked",
        "n": measured.tested,
        "batch_sizes": list(measured.similarity.sizes),
        "left_out_of_cka": measured.similarity.left_out,
        "adversarial_source": attack,
        "intervals": {
            "cka": none or f"95 %, jackknife over {batches} batches, t quantiles",
            "rankme": none or "95 %, jackknife over as many blocks of images, t quantiles",
            "probe": "95 %, Wilson",
        },
        "probes": {
            "solver": "scikit-learn L-BFGS, multinomial logistic regression, L2; strength chosen on validation",
            "strengths": list(spec.probe_strengths),
            "gradient_wanted": probes.TOLERANCE,
            "not_converged": [layer.name for layer, probe in zip(measured.layers, measured.probes, strict=True) if not probe.converged],
        },
    }


def _row(layer: Layer, probe: probes.Probe) -> dict[str, Any]:
    return {**asdict(layer), "pooling": probes.pooling(layer.shape), "probe": asdict(probe)}
