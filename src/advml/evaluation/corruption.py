"""Accuracy under common corruptions, per corruption and on average.

    >>> rights = {name: one(network, split, spec, name, machine=machine, batch_size=512) for name in spec.names}
    >>> metrics(rights)["corruption/mean"]

`corruption/<name>`: mean accuracy over the severities. `corruption/mean`: mean over the corruptions. (Hendrycks & Dietterich 2019;
their mCE divides by the errors of AlexNet, which exist only for ImageNet.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL
import scipy
import torch
from torch import Tensor

from advml import __version__
from advml.config import Corruptions
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data.corruptions.cifar_c import Published
from advml.data.corruptions.corruptions import CORRUPTIONS, corrupt
from advml.data.datasets import Split
from advml.evaluation.intervals import clustered
from advml.evaluation.run_attacks import predict
from advml.models.network import Network


@torch.no_grad()
def one(
    network: Network,
    split: Split,
    spec: Corruptions,
    name: str,
    *,
    machine: Machine,
    batch_size: int,
    published: Published | None = None,
) -> Tensor:
    """Mask (S, N) of the images that are classified correctly under one corruption, with a row per severity of `spec`.

    Args:
        split: clean images; the first `spec.images` of them are corrupted.
        published: published files, which are read instead of computing the corruption.
    Raises:
        UserError: a published file is damaged, or has other labels.
    """
    network.eval()
    rows = []
    for severity in spec.severities:
        chosen, right = _images(split, spec, name, severity, published), []
        for first in range(0, len(chosen), batch_size):
            images = chosen.images[first : first + batch_size]
            if not (published and name in published):
                images = corrupt(name, images, severity=severity, seed=spec.seed, first=first)
            right.append(predict(network, machine.images(images), machine).cpu() == chosen.labels[first : first + batch_size])
        rows.append(torch.cat(right))
    return torch.stack(rows)


def _images(split: Split, spec: Corruptions, name: str, severity: int, published: Published | None) -> Split:
    """First images of the split: corrupted ones from the published files if available, else clean ones."""
    if published and name in published:
        found = published.read(name, severity)
        if not torch.equal(found.labels, split.labels):
            folder = published.folder
            raise UserError(f"{folder} has other labels than the test images; set corruptions.folder to the files of this dataset, or null")
        split = found
    return Split(split.images[: spec.images], split.labels[: spec.images])


def metrics(results: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat metrics: accuracies, and the ends of their 95 % intervals.

    The same images recur at every severity and in every corruption, so each image counts once, with its share of correct answers (see
    `clustered`). The interval covers the choice of test images, not the random numbers of the corruptions.

    Args:
        results: name -> bool (S, N), N the same for all.
    """
    rights = {f"corruption/{name}": right for name, right in results.items()}
    if results:
        rights["corruption/mean"] = torch.cat(list(results.values()))
    flat = {}
    for name, right in rights.items():
        low, high = _interval(right)
        flat |= {name: float(right.double().mean()), f"{name}/low": low, f"{name}/high": high}
    return flat


def _interval(right: Tensor) -> tuple[float, float]:
    """95 % interval of a mean accuracy from answers (looks, N)."""
    return clustered(right.double().mean(0).tolist(), looks=len(right))


def describe(results: Mapping[str, Tensor], spec: Corruptions, *, published: Published | None = None) -> dict[str, dict[str, Any]]:
    """Record of each figure, with everything needed to repeat the measurement; can be stored as JSON."""
    computed = {
        "source": "computed",
        "library": f"advml {__version__}",
        **{library.__name__: library.__version__ for library in (np, PIL, scipy)},
        "torch": torch.__version__,
        "seed": spec.seed,
    }
    return {
        f"corruption/{name}": {
            "n": right.shape[1],
            "kind": CORRUPTIONS[name].kind,
            "severities": list(spec.severities),
            "accuracies": right.double().mean(1).tolist(),
            "interval": list(_interval(right)),
            **({"source": published.folder.name} if published and name in published else computed),
        }
        for name, right in results.items()
    }
