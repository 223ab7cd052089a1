"""Transfer of adversarial examples: accuracy of each model (target) on those of every other (source).

An image counts as correct for a target if the target classifies both the clean image and the source's adversarial image correctly. So the
diagonal equals threat model II, and no figure exceeds the target's clean accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advml.config import Grid
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.core.io import reporting_damage
from advml.core.paths import Workspace, model_name
from advml.data import adversarial
from advml.data.datasets import Split
from advml.evaluation import records, samples
from advml.evaluation.intervals import binomial_tail, wilson
from advml.evaluation.masking.rules import SIGNIFICANCE, TOLERATED, Flag
from advml.evaluation.run_attacks import predict


@dataclass(frozen=True, eq=False)
class Evaluated:
    """An evaluated model, used as target and as source.

    Attributes:
        digest: sha256 of its weights.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        stored: the file of its adversarial images.
        clean: (N,) bool, test images that it classifies correctly.
        survived: (N,) bool, those that no attack of its own evaluation has broken.
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
    """Result of `transfer`.

    `right[s][t]`: (n_s,) bool, whether model t classifies the first n_s images correctly, clean and attacked on model s; `attacks[s]`:
    record of the attack.
    """

    models: Sequence[Evaluated]
    attacks: Sequence[dict[str, Any]]
    right: Sequence[Sequence[Tensor]]


def evaluated_models(grid: Grid, workspace: Workspace, seed: int) -> list[str]:
    """Names of a seed's models that are trained and evaluated, in the grid's order."""
    names = [model_name(scheme, regime, seed) for scheme in grid.schemes for regime in grid.regimes]
    return [name for name in names if (workspace.model(name) / "model.json").exists() and records.read(workspace, "evaluate", name)]


def evaluated(workspace: Workspace, name: str, network: nn.Module, test: Split, *, digest: str) -> Evaluated:
    """Read the results of `evaluate` for the model with this name and these weights.

    Raises:
        UserError: its samples.parquet is missing or damaged, or was made with other weights or images.
    """
    path = workspace.samples(name)
    table, about = samples.read(path)
    if about.get("digest") != digest or about.get("test_digest") != samples.digest_of(test):
        raise UserError(f"{path} is of other weights or test images than {name} has now; evaluate again with: dvc repro, or advml evaluate")
    with reporting_damage(path, remedy="measure again with: dvc repro, or advml evaluate"):
        clean, survived = (torch.tensor(samples.right(table, figure)) for figure in (samples.CLEAN, samples.WORST))
        threat = str(about["norm"]), float(about["epsilon"])
    return Evaluated(name, digest, network, workspace.adversarial(name), clean, survived, threat)


def transfer(
    models: Sequence[Evaluated], test: Split, machine: Machine, *, batch_size: int, on_pair: Callable[[str, str], None] = lambda s, t: None
) -> Transfer:
    """Classify the stored adversarial images of every model with every model.

    Only one source's images are in memory at a time. Batches are those of `evaluate`, so that rounding is the same.

    Args:
        on_pair: called with the names of source and target after each pair.
    Raises:
        UserError: adversarial images are missing or damaged, or do not match the weights or the test images.
    """
    attacks, right = [], []
    for source in models:
        found = adversarial.read(source.stored, digest=source.digest)
        if found.images.shape[1:] != test.images.shape[1:] or not 0 < len(found.images) <= len(test):
            shapes = f"{tuple(found.images.shape)}, the test images {tuple(test.images.shape)}"
            raise UserError(f"{source.stored} contains images {shapes}; evaluate again with: dvc repro, or advml evaluate")
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


# Accuracies with intervals, and flags
#
# If another model's adversarial examples break images that survive all of a model's own attacks, the white-box attacks have missed these:
# a sign of masked gradients (Athalye et al. 2018, sec. 3.1). A few such images are not: every attack misses some images near the boundary,
# and models that share an encoder attack one another almost as well as themselves. PGD of 20 steps alone misses up to 2 % on the unmasked
# models of digits, none of which this rule flags.

FLAG = "transfer_stronger"
FEWEST = 3  # least number of images for a flag, because one or two may be chance
RULE = (
    f"A model is flagged if adversarial images of other models break at least {FEWEST} of the images that survive its own attacks, and "
    f"significantly more than {100 * TOLERATED:g} % of them (binomial tail below {SIGNIFICANCE:g}), since every attack misses a few."
)


@dataclass(frozen=True)
class Breaks:
    """Images of one target that transferred examples break.

    Attributes:
        survived: number of images that some source has attacked and that survive all of the target's own attacks.
        broken: number of these that the examples of any source break.
        sources: source -> number of these that its examples break, largest first, without zeros.
    """

    target: str
    survived: int
    broken: int
    sources: dict[str, int]

    @property
    def flag(self) -> Flag | None:
        """Flag by RULE; None: no flag."""
        if self.broken < FEWEST or binomial_tail(self.broken, self.survived, share=TOLERATED) >= SIGNIFICANCE:
            return None
        listed = ", ".join(f"{name} {count}" for name, count in self.sources.items())
        return Flag(
            FLAG,
            f"adversarial images of other models break {self.broken} of {self.survived} images that survive all of its own attacks: "
            f"{listed}",
            "the true worst case is lower: use stronger attacks (all of worst_case, more restarts and steps), also from those images",
        )


def breaks(found: Transfer, target: int) -> Breaks:
    """Count a target's images that transferred examples break, from sources attacked with the norm and epsilon of its evaluation."""
    model = found.models[target]
    survived, broken = torch.zeros_like(model.survived), torch.zeros_like(model.survived)
    counts = {}
    for source, attack, row in zip(found.models, found.attacks, found.right, strict=True):
        if source is model or not _same((attack["norm"], attack["epsilon"]), model.threat):
            continue
        n = len(row[target])
        by_source = model.survived[:n] & ~row[target]
        survived[:n] |= model.survived[:n]
        broken[:n] |= by_source
        counts[source.name] = int(by_source.sum())
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return Breaks(model.name, int(survived.sum()), int(broken.sum()), {name: count for name, count in most_first if count})


def _same(first: tuple[str, float], second: tuple[str, float]) -> bool:
    return first[0] == second[0] and math.isclose(first[1], second[1], rel_tol=1e-6)


def describe(found: Transfer, *, seed: int) -> dict[str, Any]:
    """Block of transfer.json for a seed: `accuracy`, `correct`, `intervals` (95 % Wilson) by [source][target], `n`, `attacks` by source."""
    correct = [[int(right.sum()) for right in row] for row in found.right]
    n = [len(row[0]) for row in found.right]
    broken = [breaks(found, target) for target in range(len(found.models))]
    return {
        "seed": seed,
        "models": [model.name for model in found.models],
        "digests": {model.name: model.digest for model in found.models},
        "n": n,
        "correct": correct,
        "accuracy": [[count / of for count in row] for row, of in zip(correct, n, strict=True)],
        "intervals": [[list(wilson(count, of)) for count in row] for row, of in zip(correct, n, strict=True)],
        "clean": [float(model.clean[: max(n)].double().mean()) for model in found.models],
        "attacks": list(found.attacks),
        "breaks": [
            {"model": one.target, "survived": one.survived, "transfer_breaks": one.broken, "sources": one.sources} for one in broken
        ],
        "flags": [{"model": one.target, **one.flag.as_record()} for one in broken if one.flag],
    }
