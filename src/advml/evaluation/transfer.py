"""Adversarial examples of each model, scored on every other.

An image counts as right for a target if the target has it right both clean and as the source's adversarial image, as under the target's
own attack: so the diagonal is threat model II, and no figure is above the target's clean accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advml.config import Grid
from advml.data import adversarial
from advml.data.datasets import Split
from advml.errors import UserError
from advml.evaluation import records, samples
from advml.evaluation.scoring import predict
from advml.paths import Workspace, model_name
from advml.runtime.machine import Machine


@dataclass(frozen=True, eq=False)
class Evaluated:
    """An evaluated model, as target and as source.

    Attributes:
        digest: sha256 of its weights.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        stored: the file of its adversarial images.
        clean: (N,) bool, which test images it has right.
        survived: (N,) bool, which of them no attack of its own evaluation has broken.
        threat: norm and epsilon of those attacks.
    """

    name: str
    digest: str
    network: nn.Module
    stored: Path
    clean: Tensor
    survived: Tensor
    threat: tuple[str, float]


@dataclass(frozen=True, eq=False)
class Transfer:
    """`right[s][t]`: (n_s,) bool, whether model t has the first n_s images right, clean and attacked on model s; `attacks[s]`: how."""

    models: Sequence[Evaluated]
    attacks: Sequence[dict[str, Any]]
    right: Sequence[Sequence[Tensor]]


def evaluated_models(grid: Grid, workspace: Workspace, seed: int) -> list[str]:
    """The names of a seed's trained models that `evaluate` has measured, in the grid's order."""
    names = [model_name(scheme, regime, seed) for scheme in grid.schemes for regime in grid.regimes]
    return [name for name in names if (workspace.model(name) / "model.json").exists() and records.read(workspace, "evaluate", name)]


def evaluated(workspace: Workspace, name: str, network: nn.Module, test: Split, *, digest: str) -> Evaluated:
    """What `evaluate` has found out about the model with this name and these weights.

    Raises:
        UserError: its samples.parquet is missing, damaged, or of other weights or images.
    """
    path = workspace.samples(name)
    table, about = samples.read(path)
    if about.get("digest") != digest or about.get("test_digest") != samples.digest_of(test):
        raise UserError(f"{path} is of other weights or test images than {name} has now; measure again with: dvc repro, or advml evaluate")
    try:
        clean, survived = (torch.tensor(samples.right(table, figure)) for figure in (samples.CLEAN, samples.WORST))
        threat = str(about["norm"]), float(about["epsilon"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); measure again with: dvc repro, or advml evaluate") from None
    return Evaluated(name, digest, network, workspace.adversarial(name), clean, survived, threat)


def transfer(
    models: Sequence[Evaluated], test: Split, machine: Machine, *, batch_size: int, on_pair: Callable[[str, str], None] = lambda s, t: None
) -> Transfer:
    """Score the stored adversarial images of every model on every model.

    The images of one source at a time are in memory. Batches are those of `evaluate`, so that rounding is the same.

    Args:
        on_pair: told the names of source and target when a pair is done.
    Raises:
        UserError: adversarial images are missing, damaged, of other weights, or do not fit the test images.
    """
    attacks, right = [], []
    for source in models:
        found = adversarial.read(source.stored, digest=source.digest)
        if found.images.shape[1:] != test.images.shape[1:] or not 0 < len(found.images) <= len(test):
            shapes = f"{tuple(found.images.shape)}, the test images {tuple(test.images.shape)}"
            raise UserError(f"{source.stored} holds images {shapes}; measure again with: dvc repro, or advml evaluate")
        attacks.append(found.record)
        right.append([])
        for target in models:
            right[-1].append(_right(target, found.images, test, machine, batch_size))
            on_pair(source.name, target.name)
    return Transfer(models, attacks, right)


def _right(target: Evaluated, images: Tensor, test: Split, machine: Machine, batch_size: int) -> Tensor:
    target.network.eval()
    batches = (batch.to(machine.device, memory_format=torch.channels_last) for batch in images.split(batch_size))
    predicted = torch.cat([predict(target.network, batch, machine).cpu() for batch in batches])
    return (predicted == test.labels[: len(images)]) & target.clean[: len(images)]
