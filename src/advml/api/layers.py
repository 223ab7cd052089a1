"""Compare layers of any modules by CKA, and probe them with linear classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from advml.api.models import BATCH, listed, machine_of
from advml.core.device import deterministic_kernels
from advml.core.errors import UserError
from advml.data.tensors import Batches, Labelled, images_of, pair, require
from advml.models.adapter import failed
from advml.models.network import eval_mode
from advml.similarity import cka, probes
from advml.similarity.layers import Layer
from advml.similarity.layers import layers as layers_of
from advml.similarity.probes import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class LayerComparison:
    """Linear CKA of every layer of one model with every layer of another (Nguyen et al. 2021, unbiased, over batches).

    Attributes:
        matrix: (L1, L2); near 1: equal up to rotation and scale, near 0: unrelated, NaN: a layer is constant.
        rows, columns: names of the layers, in the order in which they execute.
        images: number of images used.
        left_out: number of images in batches of fewer than 4, for which the estimator is not defined.
        similarity: the estimator's terms per batch, from which intervals can be computed.
    """

    matrix: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    images: int
    left_out: int
    similarity: cka.Similarity

    def __repr__(self) -> str:
        finite = self.matrix[np.isfinite(self.matrix)]
        spread = f"{finite.min():.3f} to {finite.max():.3f}" if finite.size else "not finite"
        without = f" ({self.left_out} left out)" if self.left_out else ""
        return f"LayerComparison({len(self.rows)} x {len(self.columns)} layers, {self.images} images{without}, CKA {spread})"

    def plot(self, *, title: str = "CKA between layers", row_label: str = "", column_label: str = "") -> Figure:
        """Draw the matrix as a heat map from 0 to 1 with the first layers at the lower left; returns a matplotlib figure."""
        from advml.figures.layers import Heatmap, heatmaps

        return heatmaps([Heatmap(self.matrix, "", self.rows, self.columns, row_label, column_label)], title=title, columns=1, size=4.0)

    def _repr_png_(self) -> bytes:
        """PNG of the heat map, which notebooks display."""
        from advml.figures.style import to_png

        return to_png(self.plot())


def compare_layers(
    first: nn.Module,
    second: nn.Module,
    images: Tensor | Batches,
    other_images: Tensor | Batches | None = None,
    *,
    layers: str | Sequence[str] = "all",
    batch_size: int = 100,
) -> LayerComparison:
    """CKA between the layers of two models, or of one model on two versions of the images.

    Args:
        first: its layers are the rows. Any module that accepts the images; it need not return logits.
        second: its layers are the columns; may be `first` itself.
        images: (N, C, H, W), or batches of images or of (images, ...).
        other_images: input of `second`: a version of the same images in the same order, e.g. attacked; None: `images`.
        layers: "all", "blocks" (residual, transformer blocks), or patterns of names such as "layer3.*".
        batch_size: images per batch of the estimator, at least 4; ignored if `images` are batches already.
    Raises:
        UserError: a model fails on the images, no layer matches `layers`, there are too few images, or the batches of both inputs differ in
            size.

    Example:
        >>> compared = advml.compare_layers(model, model, images, batch_size=20)
        >>> compared.rows, compared.images, bool(compared.matrix[1, 1].round(6) == 1)
        (('0', '1'), 40, True)
    """
    models = {"first": first, "second": second}
    machine, _ = machine_of(first), machine_of(second)
    with eval_mode(first), eval_mode(second), deterministic_kernels():
        shown = list(images_of(images, batch_size))
        others = shown if other_images is None else list(images_of(other_images, batch_size))
        counts = [[len(batch) for batch in part] for part in (shown, others)]
        require(
            counts[0] == counts[1], f"{sum(counts[0])} images, but {sum(counts[1])} other_images; give the same number, in equal batches"
        )
        batches = [{("first", ""): one, ("second", ""): other} for one, other in zip(shown, others, strict=True)]
        largest = max(batches, key=lambda batch: len(batch["first", ""]), default=None)
        require(
            largest is not None and len(largest["first", ""]) >= cka.SMALLEST_BATCH,
            f"CKA needs batches of {cka.SMALLEST_BATCH} images or more",
        )
        assert largest is not None
        rows = {name: tuple(_rows(one, machine.images(largest[name, ""][:2]), layers)) for name, one in models.items()}
        keys = (("first", ""), ("second", ""))
        try:
            passed = ({key: machine.images(batch[key]) for key in keys} for batch in batches)
            similarity = cka.measure(models, rows, passed, pairs=[keys])
        except ValueError as error:
            raise UserError(f"compare_layers: {error}") from None
    names = [tuple(layer.name for layer in rows[name]) for name in models]
    return LayerComparison(similarity.cka(*keys), names[0], names[1], sum(similarity.sizes), similarity.left_out, similarity)


def probe_layers(
    model: nn.Module,
    train: Labelled,
    validation: Labelled,
    tests: Mapping[str, Labelled],
    *,
    layers: str | Sequence[str] = "all",
    strengths: Sequence[float] = (0.01, 0.1, 1.0),
    batch_size: int = BATCH,
) -> dict[str, Probe]:
    """Accuracy of a linear classifier on each layer's features, averaged over space.

    Args:
        model: any module that accepts images.
        train: (images, labels), or batches of them, on which each probe is fitted: multinomial logistic regression with an L2 penalty.
        validation: (images, labels) on which the penalty is chosen.
        tests: name -> (images, labels), e.g. {"clean": (images, labels), "adversarial": (attacked, labels)}.
        layers: as in `compare_layers`.
        strengths: inverse penalties to choose from.
        batch_size: images in a forward pass.
    Returns:
        Name of the layer -> `Probe` (accuracy by name of the test, and its fit), in the order in which layers execute.
    Raises:
        UserError: the model fails on the images, no layer matches `layers`, or images and labels are not valid.

    Example:
        >>> split = images[:20], labels[:20]
        >>> probe = advml.probe_layers(model, split, split, {"clean": (images, labels)})["1"]
        >>> sorted(probe.accuracy), probe.converged
        (['clean', 'validation'], True)
    """
    machine = machine_of(model)
    require(isinstance(tests, Mapping), f"tests must be a dictionary from names to (images, labels), not {type(tests).__name__}")
    given = {"train": train, "validation": validation} | {f"test {name}": one for name, one in tests.items()}
    splits = {name: pair(one, of=name) for name, one in given.items()}
    with eval_mode(model), deterministic_kernels():
        rows = _rows(model, machine.images(splits["train"].images[:2]), layers)
        features = {
            name: probes.pooled_features(model, rows, map(machine.images, split.images.split(batch_size))) for name, split in splits.items()
        }

    def of(name: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        return features[name][number], splits[name].labels.cpu().numpy()

    return {
        layer.name: probes.fit(
            of("train", number), of("validation", number), {name: of(f"test {name}", number) for name in tests}, strengths=strengths
        )
        for number, layer in enumerate(rows)
    }


def _rows(model: nn.Module, images: Tensor, layers: str | Sequence[str]) -> list[Layer]:
    """Layers of the model that match."""
    try:
        return layers_of(model, images, select=listed(layers))
    except UserError:
        raise
    except Exception as error:  # third-party code may raise anything
        raise failed("the model", images, error) from None
