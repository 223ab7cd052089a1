"""Clean and robust accuracy with intervals, and a record of how each figure was made.

`accuracy/threat_model_1`: PGD on the contrastive objective of encoder and projection head, then classify.
`accuracy/threat_model_2`: PGD end to end on the classifier's cross-entropy.
Each at `evaluate.epsilon` (by default that of training) and, under the suffix `_half`, at half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from advml import config
from advml.attacks.adversary import Adversary, evaluation_adversary
from advml.attacks.pgd import Objective
from advml.data.datasets import Split
from advml.evaluation.intervals import wilson
from advml.networks.models import Network
from advml.runtime.machine import Machine, generator_for
from advml.training.loop import batches
from advml.training.schemes import Scheme
from advml.training.tasks import classification_objective, contrastive_objective

# (network, images, labels) -> objective; built anew for every batch of images.
MakeObjective = Callable[[Network, Tensor, Tensor], Objective]


@dataclass(frozen=True)
class Figure:
    """One accuracy to measure: its metric name and its attack. `adversary=None` is clean accuracy."""

    name: str
    adversary: Adversary | None = None
    objective: MakeObjective | None = None
    loss: str = ""  # the objective's name, for the record
    coupled: bool = False  # the objective couples the batch: images must not leave it
    kept: bool = False  # its adversarial images are stored, for `represent` and `compare`
    note: str = ""


def figures(configuration: config.Config, scheme: Scheme, *, note: str = "") -> list[Figure]:
    """What `evaluate` measures for a model of `scheme`; SL has no projection head, so no threat model I."""
    listed = [Figure("accuracy/clean")]
    for suffix, share in (("", 1.0), ("_half", 0.5)):
        adversary = evaluation_adversary(configuration, epsilon=share * configuration.attacked_epsilon)
        if scheme.groups:
            make = _contrastive(scheme.groups, configuration.temperature)
            listed.append(Figure(f"accuracy/threat_model_1{suffix}", adversary, make, loss="contrastive", coupled=True, note=note))
        listed.append(Figure(f"accuracy/threat_model_2{suffix}", adversary, _classification, loss="cross-entropy", kept=share == 1))
    return listed


def _classification(network: Network, images: Tensor, labels: Tensor) -> Objective:
    return classification_objective(network, labels)


def _contrastive(groups: Callable[[Tensor], Tensor], temperature: float) -> MakeObjective:
    return lambda network, images, labels: contrastive_objective(network, images, groups(labels), temperature=temperature)


class Keep:
    """Collects adversarial images of the first `limit` images (None: of all)."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.count = limit, 0
        self._parts: list[Tensor] = []

    @property
    def wants_more(self) -> bool:
        return self.limit is None or self.count < self.limit

    def add(self, images: Tensor) -> None:
        """Take a batch (n, C, H, W), as far as it is wanted."""
        part = images if self.limit is None else images[: self.limit - self.count]
        self._parts.append(part.float().cpu())
        self.count += len(part)

    @property
    def images(self) -> Tensor:
        """(count, C, H, W)."""
        return torch.cat(self._parts).contiguous()


def correct(
    network: Network,
    split: Split,
    figure: Figure,
    *,
    batch_size: int,
    restarts: int,
    seed: int,
    machine: Machine,
    on_batch: Callable[[int], None] = lambda images: None,
    keep: Keep | None = None,
) -> Tensor:
    """Which images are classified right, clean or after the figure's attack: bool (N,).

    With restarts an image counts as right only if it survives every one. Images that are wrong already
    leave the batch, but only where the objective is per sample: a contrastive one couples the batch.

    Args:
        keep: takes the first restart's adversarial images, for which also images that are wrong already are attacked.
    """
    network.eval()
    results = []
    for number, (images, labels) in enumerate(batches(split, machine, size=batch_size)):
        right = _predict_right(network, images, labels, machine)
        if figure.adversary:
            for restart in range(restarts):
                kept = keep is not None and keep.wants_more and restart == 0
                rows = torch.arange(len(labels), device=labels.device) if figure.coupled or kept else right.nonzero().squeeze(1)
                if not len(rows):
                    break
                generator = generator_for(figure.name, seed, number, restart)
                adversarial = _attack(network, figure, images[rows], labels[rows], generator, machine)
                if kept:
                    keep.add(adversarial)
                right[rows] &= _predict_right(network, adversarial, labels[rows], machine)
        results.append(right.cpu())
        on_batch(len(labels))
    return torch.cat(results)


def attacked(
    network: Network, split: Split, configuration: config.Config, scheme: Scheme, machine: Machine
) -> tuple[Tensor, dict[str, Any]]:
    """Adversarial images of the first test images as `evaluate` would store them, and the record of their attack."""
    spec = configuration.evaluate
    (figure,) = (figure for figure in figures(configuration, scheme) if figure.kept)
    keep = Keep(spec.adversarial_images)
    some = Split(split.images[: spec.adversarial_images], split.labels[: spec.adversarial_images])
    right = correct(network, some, figure, batch_size=spec.batch_size, restarts=1, seed=spec.seed, machine=machine, keep=keep)
    return keep.images, describe(figure, right, configuration) | {"restarts": 1}


def _attack(network: Network, figure: Figure, images: Tensor, labels: Tensor, generator: torch.Generator, machine: Machine) -> Tensor:
    with machine.autocast():
        return figure.adversary.attack(network, lambda: figure.objective(network, images, labels), images, generator=generator)


@torch.no_grad()
def _predict_right(network: Network, images: Tensor, labels: Tensor, machine: Machine) -> Tensor:
    with machine.autocast():
        return network(images).argmax(1) == labels


def metrics(results: dict[str, Tensor]) -> dict[str, float]:
    """Flat metrics under the contract's names: share right, and the ends of its 95 % interval."""
    flat = {}
    for name, right in results.items():
        low, high = wilson(int(right.sum()), len(right))
        flat |= {name: float(right.double().mean()), f"{name}/low": low, f"{name}/high": high}
    return flat


def describe(figure: Figure, right: Tensor, configuration: config.Config) -> dict[str, Any]:
    """The record of one figure: everything needed to measure it again."""
    spec = configuration.evaluate
    record: dict[str, Any] = {"n": len(right), "correct": int(right.sum()), "interval": list(wilson(int(right.sum()), len(right)))}
    if figure.adversary is None:
        return record
    attack = asdict(figure.adversary)
    threat_model = attack.pop("threat_model")
    return record | {
        "attack": "pgd",
        "objective": figure.loss,
        **threat_model,
        "box": [0, 1],
        **attack,
        "restarts": spec.restarts,
        "seed": spec.seed,
        "batch_size": spec.batch_size,
        **({"note": figure.note} if figure.note else {}),
    }
