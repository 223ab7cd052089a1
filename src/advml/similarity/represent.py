"""Measure the representations of one model: CKA of its layers on clean and adversarial images, scalars, RankMe and probes.

Files in `reports/<MODEL>/`: `cka.npz` with `clean`, `adversarial`, `clean_adversarial` (L x L; rows of the last are clean), the products
per batch from which they are computed (`products_clean`, ..., `norms_clean`, ...), and for every other measure `<measure>/clean`, ...
(1 + B, L, L), the values and those without each block of images; `cka.json` with the layers in execution order, the probes, and the
method.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from advml import config
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.core.io import reporting_damage, sha256
from advml.core.messages import tell
from advml.data.datasets import Dataset, Split
from advml.evaluation.intervals import wilson
from advml.models.network import Network
from advml.similarity import alternatives, measures, probes
from advml.similarity.alternatives import MEASURES, Tables
from advml.similarity.cka import SMALLEST_BATCH, Key, Similarity, measure
from advml.similarity.layers import Layer, layers
from advml.similarity.statistics import FEWEST_BATCHES

CLEAN, ADVERSARIAL = "clean", "adversarial"
KINDS = (CLEAN, ADVERSARIAL)
# Name of a matrix in cka.npz -> the kinds of input of its rows and columns.
MATRICES = {"clean": (CLEAN, CLEAN), "adversarial": (ADVERSARIAL, ADVERSARIAL), "clean_adversarial": (CLEAN, ADVERSARIAL)}
PARTS = ("similarity", "features", "probes")  # parts of the measurement, in order
WANTED_BATCHES = 10  # least number of batches for which batch_size is not reduced
FEWEST = 8  # images per batch below which it is not reduced
MODEL = ""  # name of the model in a `Similarity` of a single model
PAIRS = tuple(((MODEL, first), (MODEL, second)) for first, second in MATRICES.values())
ESTIMATOR = "linear CKA, unbiased HSIC_1 per batch, ratio of sums over batches (Nguyen et al. 2021)"


@dataclass(frozen=True, eq=False)
class Representation:
    """Result of `represent`."""

    layers: tuple[Layer, ...]
    counted: np.ndarray  # (L,) bool: the rows that are counted in scalars
    similarity: Similarity
    probes: tuple[probes.Probe, ...]
    rankme: tuple[float, float, float]  # value, low, high
    tested: int  # number of test images
    tables: Mapping[str, Tables]  # values of measures other than CKA

    @property
    def last(self) -> int:
        """Row on which RankMe and the probe in the metrics are measured."""
        return last_of_encoder(self.layers)

    def cka(self, first: str, second: str) -> np.ndarray:
        """CKA (L, L) between layers on two kinds of input."""
        return self.similarity.cka((MODEL, first), (MODEL, second))


def counted_rows(rows: tuple[Layer, ...]) -> np.ndarray:
    """Mask of the rows counted in scalars: blocks, if only these and the encoder's output were recorded; else all rows of the encoder."""
    encoder = [layer for layer in rows if layer.in_encoder]
    others = [layer for layer in encoder if not layer.is_block]
    only_blocks = len(encoder) > len(others) and len(others) <= 1
    return np.array([layer.in_encoder and (layer.is_block or not only_blocks) for layer in rows])


def ending_row(rows: tuple[Layer, ...]) -> int:
    """Last recorded row of the encoder; the last row of all, if none of the encoder was recorded."""
    return max((number for number, layer in enumerate(rows) if layer.in_encoder), default=len(rows) - 1)


def last_of_encoder(rows: tuple[Layer, ...]) -> int:
    """Last recorded row of the encoder.

    Raises:
        UserError: none was recorded.
    """
    last = ending_row(rows)
    if not rows[last].in_encoder:
        names = ", ".join(layer.name for layer in rows)
        raise UserError(
            f"similarity.layers selects no layer of the encoder, only {names}; use blocks, all, or patterns of the encoder's layers"
        )
    return last


def represent(
    network: Network,
    dataset: Dataset,
    adversarial: Tensor,
    spec: config.Similarity,
    machine: Machine,
    *,
    on_part: Callable[[str], None] = lambda part: None,
) -> Representation:
    """Measure a network on the first test images and their adversarial examples.

    Args:
        adversarial: (n, C, H, W) in [0, 1], adversarial versions of the first n test images.
        on_part: called with the name of the next part, for progress bars.
    Raises:
        UserError: there are too few images, or no layer of the encoder is selected.
    """
    rows = tuple(layers(network, machine.images(dataset.test.images[:2]), select=spec.layers))
    last = last_of_encoder(rows)
    on_part(PARTS[0])
    views = views_of_split({MODEL: adversarial}, dataset.test, machine)
    similarity = measure({MODEL: network}, {MODEL: rows}, paired_batches(views, len(adversarial), spec), gram=spec.gram)
    on_part(PARTS[1])
    features = _Features.of(network, rows, dataset, adversarial, spec, machine)
    on_part(PARTS[2])
    with threadpool_limits(torch.get_num_threads()):  # else NumPy's threads would compete with other stages
        fitted = tuple(features.probe(number, spec.probe_strengths) for number in range(len(rows)))
        rank = features.test[CLEAN][last]
        rankme = (measures.rankme(rank), *measures.rankme_interval(rank, blocks=len(similarity.sizes)))
        tables = further_tables({(MODEL, kind): features.test[kind] for kind in KINDS}, PAIRS, spec.measures)
    return Representation(rows, counted_rows(rows), similarity, fitted, rankme, len(adversarial), tables)


def further_tables(
    features: Mapping[Key, list[np.ndarray]], pairs: Sequence[tuple[Key, Key]], names: Sequence[str], *, intervals: bool = True
) -> dict[str, Tables]:
    """Tables of those measures in `names` other than CKA, from the pooled features (N, C) of every key's rows."""
    further = [name for name in names if name in MEASURES]
    if not further:
        return {}
    places = alternatives.chosen(min(len(found[0]) for found in features.values()))
    kept = {key: [alternatives.compact(each, places) for each in found] for key, found in features.items()}
    found = {}
    for name in further:
        found[name] = alternatives.tables(MEASURES[name], kept, pairs, intervals=intervals)
        missing, total = alternatives.without_value(kept, found[name])
        if missing:
            images = f"{len(places)} images are too few (it needs {MEASURES[name].needs})"
            tell(f"warning: {name} has no value for {missing} of {total} pairs of layers, which are left out of means: {images}")
    return found


View = Callable[[slice | Tensor], Tensor]  # indices, in an order that all views share -> input images (n, C, H, W) of a network


def views_of_split(adversarial: Mapping[str, Tensor], split: Split, machine: Machine) -> dict[Key, View]:
    """Views of a split for models that accept its images: clean, and adversarial for each model."""

    def clean(place: slice | Tensor) -> Tensor:
        return machine.images(split.images[place])

    def attacked(images: Tensor) -> View:
        return lambda place: images[place].to(machine.device, torch.float32)

    return {(model, kind): clean if kind == CLEAN else attacked(images) for model, images in adversarial.items() for kind in KINDS}


def paired_batches(views: Mapping[Key, View], count: int, spec: config.Similarity) -> Iterator[dict[Key, Tensor]]:
    """Yield batches of the same images for every key.

    Batches are smaller than `spec.batch_size` if there would be fewer than WANTED_BATCHES, which intervals need.

    Raises:
        UserError: there are too few images.
    """
    if count < SMALLEST_BATCH:
        raise UserError(
            f"CKA needs {SMALLEST_BATCH} images or more, but there are {count}; raise evaluate.adversarial_images or data.max_test"
        )
    size = min(spec.batch_size, max(FEWEST, count // WANTED_BATCHES))
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        seen: dict[View, Tensor] = {}  # clean images are shared by all models
        yield {key: seen[view] if view in seen else seen.setdefault(view, view(place)) for key, view in views.items()}


@dataclass(frozen=True, eq=False)
class _Features:
    """Pooled features of every row, (N, C) each, and their labels."""

    train: list[np.ndarray]
    validation: list[np.ndarray]
    test: dict[str, list[np.ndarray]]
    labels: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, network: Network, rows: tuple[Layer, ...], dataset: Dataset, adversarial: Tensor, spec: config.Similarity, machine: Machine
    ) -> _Features:
        def pooled(images: Tensor) -> list[np.ndarray]:
            return probes.pooled_features(network, rows, map(machine.images, images.split(512)))

        chosen = slice(spec.probe_images)
        return cls(
            train=pooled(dataset.train.images[chosen]),
            validation=pooled(dataset.validation.images),
            test={
                CLEAN: pooled(dataset.test.images[: len(adversarial)]),
                ADVERSARIAL: probes.pooled_features(network, rows, (part.to(machine.device) for part in adversarial.split(512))),
            },
            labels={
                "train": dataset.train.labels[chosen].numpy(),
                "validation": dataset.validation.labels.numpy(),
                "test": dataset.test.labels[: len(adversarial)].numpy(),
            },
        )

    def probe(self, number: int, strengths: tuple[float, ...]) -> probes.Probe:
        """Fit the probe of one row."""
        return probes.fit(
            (self.train[number], self.labels["train"]),
            (self.validation[number], self.labels["validation"]),
            {kind: (self.test[kind][number], self.labels["test"]) for kind in KINDS},
            strengths=strengths,
        )


# Files: scalars as metrics, arrays for cka.npz, and the method for cka.json

# Keys of cka.json that are repeated in the record: the method, and conditions that must be equal before models are compared.
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
    "measures",
)


def metrics(measured: Representation) -> dict[str, float]:
    """Flat metrics: `cka/<scalar>`, `cka/rankme`, `probe/<clean|adversarial>`, each with /low and /high; NaN if there is no value.

    RankMe and the probe use the last recorded layer of the encoder. Intervals: jackknife over batches; Wilson for probes.
    """
    flat: dict[str, float] = {}
    for name, scalar in measures.SCALARS.items():
        for further, of in {"cka": measured.similarity, **measured.tables}.items():
            found = measures.estimate(of, scalar, MODEL, MODEL, rows=measured.counted, columns=measured.counted)
            whole = _with_interval(f"{further}/{name}", found.value, found.interval)
            flat |= whole if of.sizes else {f"{further}/{name}": found.value}
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
    """Content of cka.npz."""
    products = measured.similarity.products
    return (
        {name: measured.cka(*pair) for name, pair in MATRICES.items()}
        | {f"products_{name}": products[(MODEL, first), (MODEL, second)] for name, (first, second) in MATRICES.items()}
        | {f"norms_{kind}": measured.similarity.norms[MODEL, kind] for kind in KINDS}
        | {"sizes": np.array(measured.similarity.sizes), "counted": measured.counted}
        | {
            f"{name}/{matrix}": table.tables[pair]
            for name, table in measured.tables.items()
            for matrix, pair in zip(MATRICES, PAIRS, strict=True)
        }
        | {f"{name}/sizes": np.array(table.sizes, dtype=int) for name, table in measured.tables.items()}
    )


# Keys of an attack's record that describe its settings; the others describe its results.
SETTINGS = (
    *("attack", "objective", "norm", "epsilon", "box", "steps", "step_size", "random_start", "keep", "mode", "seed", "batch_size"),
    *("images", "shares"),  # settings of the diagnostics' probes
)


def settings(attack: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an attack, from its record; empty for clean images."""
    return {key: attack[key] for key in SETTINGS if key in attack}


def content(path: Path, *, digest: str | None) -> io.BytesIO:
    """Read a file, and compare its sha256 with that in a record.

    Raises:
        UserError: the file is missing or differs: a stage was killed between file and record, or the file was changed since.
    """
    try:
        found = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); measure again with: dvc repro") from None
    if sha256(found) != digest:
        raise UserError(f"{path} is not the file of its record; measure again with: dvc repro, or advml represent and compare")
    return io.BytesIO(found)


def read(path: Path, *, digest: str | None, measure: str = "cka") -> tuple[Similarity | Tables, np.ndarray]:
    """Read one measure's values from a cka.npz, with MODEL as the model's name, and the mask (L,) of rows counted in scalars.

    Args:
        digest: sha256 of the file, from the record.
    Raises:
        UserError: the file is missing, damaged, or not that of the record, or lacks the measure.
    """
    again = {"remedy": "measure again with: dvc repro", "errors": (BadZipFile,)}
    with reporting_damage(path, **again), np.load(content(path, digest=digest), allow_pickle=False) as stored:
        if measure != "cka":
            found = {pair: stored[f"{measure}/{matrix}"] for matrix, pair in zip(MATRICES, PAIRS, strict=True)}
            return Tables(found, tuple(stored[f"{measure}/sizes"].tolist())), stored["counted"]
        products = {((MODEL, first), (MODEL, second)): stored[f"products_{name}"] for name, (first, second) in MATRICES.items()}
        norms = {(MODEL, kind): stored[f"norms_{kind}"] for kind in KINDS}
        return Similarity({}, products, norms, tuple(stored["sizes"].tolist())), stored["counted"]


def describe(measured: Representation, spec: config.Similarity, *, of: dict[str, Any], attack: dict[str, Any]) -> dict[str, Any]:
    """Content of cka.json: layers, probes, and method.

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
        **alternatives.describe(list(measured.tables), measured.tested),
    }


def _row(layer: Layer, probe: probes.Probe) -> dict[str, Any]:
    return {**asdict(layer), "pooling": probes.pooling(layer.shape), "probe": asdict(probe)}


# .npz files whose bytes depend only on the arrays; NumPy's own writer includes the time of day

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time of the format


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Content of a compressed .npz file for `numpy.load`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
    return stream.getvalue()
