"""The representations of one model: CKA of its layers on clean and adversarial images, scalars, RankMe and probes.

Files of a model, in `reports/<MODEL>/`: `cka.npz` with `clean`, `adversarial`, `clean_adversarial` (L x L; rows of the last are
clean), and per batch the products they were made from (`products_clean`, ..., `norms_clean`, ...); `cka.json` with the layers in
execution order, the probes, and how everything was measured.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
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
from advml.core.io import sha256
from advml.data.datasets import Dataset, Split
from advml.evaluation.intervals import wilson
from advml.models.network import Network
from advml.similarity import measures, probes
from advml.similarity.cka import SMALLEST_BATCH, Key, Similarity, measure
from advml.similarity.layers import Layer, layers
from advml.similarity.statistics import FEWEST_BATCHES

CLEAN, ADVERSARIAL = "clean", "adversarial"
KINDS = (CLEAN, ADVERSARIAL)
# Name of a matrix in cka.npz -> the kinds of input of its rows and columns.
MATRICES = {"clean": (CLEAN, CLEAN), "adversarial": (ADVERSARIAL, ADVERSARIAL), "clean_adversarial": (CLEAN, ADVERSARIAL)}
PARTS = ("similarity", "features", "probes")  # of the measurement, in order
WANTED_BATCHES = 10  # to be drawn from
FEWEST = 8  # images of a batch, if there are so many
MODEL = ""  # the name of the only model in a similarity of one
ESTIMATOR = "linear CKA, unbiased HSIC_1 per batch, ratio of sums over batches (Nguyen et al. 2021)"


@dataclass(frozen=True, eq=False)
class Representation:
    """What `represent` has measured."""

    layers: tuple[Layer, ...]
    counted: np.ndarray  # (L,) bool: the rows that scalars are made of
    similarity: Similarity
    probes: tuple[probes.Probe, ...]
    rankme: tuple[float, float, float]  # value, low, high
    tested: int  # images

    @property
    def last(self) -> int:
        """The row that RankMe and the probe of the metrics are of."""
        return last_of_encoder(self.layers)

    def cka(self, first: str, second: str) -> np.ndarray:
        """(L, L), by kinds of input."""
        return self.similarity.cka((MODEL, first), (MODEL, second))


def counted_rows(rows: tuple[Layer, ...]) -> np.ndarray:
    """The rows that scalars are made of: the blocks if nothing else of the encoder but its output was recorded, else all of the encoder."""
    encoder = [layer for layer in rows if layer.in_encoder]
    others = [layer for layer in encoder if not layer.is_block]
    only_blocks = len(encoder) > len(others) and len(others) <= 1
    return np.array([layer.in_encoder and (layer.is_block or not only_blocks) for layer in rows])


def last_of_encoder(rows: tuple[Layer, ...]) -> int:
    """The last recorded row of the encoder.

    Raises:
        UserError: none was recorded.
    """
    found = [number for number, layer in enumerate(rows) if layer.in_encoder]
    if not found:
        names = ", ".join(layer.name for layer in rows)
        raise UserError(
            f"similarity.layers selects no layer of the encoder, only {names}; use blocks, all, or patterns of the encoder's layers"
        )
    return found[-1]


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
        adversarial: (n, C, H, W) in [0, 1], of the first n test images.
        on_part: called with what is done next, for progress bars.
    Raises:
        UserError: too few images, or no layer of the encoder.
    """
    rows = tuple(layers(network, machine.images(dataset.test.images[:2]), select=spec.layers))
    last = last_of_encoder(rows)
    on_part(PARTS[0])
    similarity = measure({MODEL: network}, {MODEL: rows}, paired_batches({MODEL: adversarial}, dataset.test, spec, machine), gram=spec.gram)
    on_part(PARTS[1])
    features = _Features.of(network, rows, dataset, adversarial, spec, machine)
    on_part(PARTS[2])
    with threadpool_limits(torch.get_num_threads()):  # NumPy's own threads would fight with other stages
        fitted = tuple(features.probe(number, spec.probe_strengths) for number in range(len(rows)))
        rank = features.test[CLEAN][last]
        rankme = (measures.rankme(rank), *measures.rankme_interval(rank, blocks=len(similarity.sizes)))
    return Representation(rows, counted_rows(rows), similarity, fitted, rankme, len(adversarial))


def paired_batches(adversarial: dict[str, Tensor], split: Split, spec: config.Similarity, machine: Machine) -> Iterator[dict[Key, Tensor]]:
    """Batches of the same test images, clean for every model and as attacked for each.

    Smaller ones than asked for where there would be fewer than WANTED_BATCHES: without them there is no interval.

    Raises:
        UserError: there are too few adversarial images.
    """
    count = min(len(images) for images in adversarial.values())
    if count < SMALLEST_BATCH:
        raise UserError(
            f"CKA needs {SMALLEST_BATCH} adversarial images or more, there are {count}; raise evaluate.adversarial_images or data.max_test"
        )
    size = min(spec.batch_size, max(FEWEST, count // WANTED_BATCHES))

    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        clean = machine.images(split.images[place])
        attacked = {model: images[place].to(clean) for model, images in adversarial.items()}
        yield {(model, kind): clean if kind == CLEAN else attacked[model] for model in adversarial for kind in KINDS}


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
        """The probe of one row."""
        return probes.fit(
            (self.train[number], self.labels["train"]),
            (self.validation[number], self.labels["validation"]),
            {kind: (self.test[kind][number], self.labels["test"]) for kind in KINDS},
            strengths=strengths,
        )


# What is written: scalars as metrics, arrays for cka.npz, and how they were measured for cka.json

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
    for name, scalar in measures.SCALARS.items():
        found = measures.estimate(measured.similarity, scalar, MODEL, MODEL, rows=measured.counted, columns=measured.counted)
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
    if sha256(found) != digest:
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


# Arrays in a .npz file whose bytes depend on the arrays alone: NumPy's own writer puts the time of day in

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a compressed .npz file, which `numpy.load` reads."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
    return stream.getvalue()
