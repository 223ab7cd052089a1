"""Kinds of adversarial training (`attack.kind`).

| kind | perturbation of a batch                                       | backward passes of a batch    | source              |
|------|---------------------------------------------------------------|-------------------------------|---------------------|
| pgd  | `steps` of PGD                                                | steps, then one for each term | Madry et al. 2018   |
| fast | one step of 1.25 epsilon from a random start                  | 1, then one for each term     | Wong et al. 2020    |
| free | kept from batch to batch, updated by each of `steps` replays  | one per replay, with weights  | Shafahi et al. 2019 |

Validation uses PGD for all kinds, at the full epsilon; for fast and free with at least STEPS_OF_VALIDATION steps of 2.5 epsilon / steps,
independently of the training's step size. To add a kind, add a row to KINDS and its name to `config.phases.AttackKind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advml import config
from advml.attacks.pgd import Adversary, default_step_size, finite, training_adversary
from advml.core import ranks
from advml.core.device import Machine
from advml.training.tasks import Task

STEPS_OF_VALIDATION = 5


@dataclass(frozen=True)
class AdversarialTraining:
    """Attacks of a training phase.

    Attributes:
        training: attack on training batches; free training uses only its epsilon and step size.
        validation: PGD for the validation of epochs.
        replays: number of replays of a batch in free training; 0: batches are attacked, not replayed.
        guarded: whether training ends at catastrophic overfitting.
    """

    training: Adversary
    validation: Adversary
    replays: int = 0
    guarded: bool = False

    def passes(self, epochs: int) -> int:
        """Number of passes over the images: epochs divided by replays, so that the number of optimiser steps stays the same."""
        return math.ceil(epochs / max(1, self.replays))


def _free(adversary: Adversary, step_size: float | None) -> AdversarialTraining:
    moved = replace(adversary, step_size=step_size or adversary.threat_model.epsilon)
    return AdversarialTraining(moved, _validating(adversary), replays=adversary.steps)


def _fast(adversary: Adversary, step_size: float | None) -> AdversarialTraining:
    one_step = replace(adversary, steps=1, step_size=step_size or 1.25 * adversary.threat_model.epsilon)
    return AdversarialTraining(one_step, _validating(adversary), guarded=True)


def _validating(adversary: Adversary) -> Adversary:
    steps = max(adversary.steps, STEPS_OF_VALIDATION)
    return replace(adversary, steps=steps, step_size=default_step_size(adversary.threat_model.epsilon, steps))


# attack.kind -> function that makes the attacks from the PGD settings and attack.step_size
KINDS: dict[str, Callable[[Adversary, float | None], AdversarialTraining]] = {
    "pgd": lambda adversary, step_size: AdversarialTraining(adversary, adversary),
    "free": _free,
    "fast": _fast,
}


def adversarial_training(
    spec: config.TrainAttack, threat: config.ThreatModelSection, phase: config.Phase | None = None
) -> AdversarialTraining:
    """Attacks of a phase, from params.yaml; a phase may set its own kind, epsilon and number of steps."""
    kind = (phase and phase.attack_kind) or spec.kind
    return KINDS[kind](training_adversary(spec, threat, phase), spec.step_size)


class FreePerturbation:
    """Perturbation d of free adversarial training, one per position in the batch, 0 before the first batch. Each process has that of its
    images.

    Each replay of a batch with views t(x), the last of which are perturbed (Shafahi et al. 2019, alg. 1; for SimCLR and EMP-SSL
    arXiv 2501.03507), computes

        g_w, g_d = grad L(t(x) + d);    d <- project(d + step_size * steepest(g_d))

    with a projection onto ball and box. Deviation: the authors' images leave the box at the first replay of a batch, where d is from other
    images; here t(x) + d is projected first.
    """

    def __init__(self, adversary: Adversary, machine: Machine) -> None:
        self.adversary, self.machine = adversary, machine
        self.values: Tensor | None = None  # (rows, C, H, W)

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed training restores, over all processes."""
        return {} if self.values is None else {"perturbation": ranks.everyones(self.values)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        if "perturbation" in state:
            self.values = ranks.own(state["perturbation"].to(self.machine.device))

    def replay(self, task: Task, views: Tensor, labels: Tensor, *, share: float) -> Iterator[Tensor]:
        """Yield the mean loss of one replay once, then update d if the caller has computed its gradients.

        Args:
            views: (V N, C, H, W) in [0, 1], the same in all replays of a batch.
            share: factor on epsilon and step size.
        """
        adversary, rows = self.adversary.scaled(share), task.perturbed_rows(len(labels))
        fixed, images = views[:-rows], views[-rows:]
        start = images if self.values is None else adversary.threat_model.project(images + self.values, images)
        adversarial = start.detach().clone().requires_grad_()
        with self.machine.autocast(training=True):
            loss = ranks.mean(task.loss_of_views(torch.cat([fixed, adversarial]), labels))
        yield loss
        if adversarial.grad is not None:
            moved = adversary.threat_model.ascend(adversarial.detach(), finite(adversarial.grad), images, step_size=adversary.step_size)
            self.values = moved - images


# Catastrophic overfitting (Wong et al. 2020, sec. 5.4): within an epoch, robustness against PGD is lost while the training loss falls.

WITHSTOOD, COLLAPSED = "validation/withstood", "validation/collapsed"  # keys of an epoch's record


def has_collapsed(shares: Sequence[float], *, images: int, classes: int) -> bool:
    """Whether the share of validation images that withstand PGD has collapsed in the last epoch: catastrophic overfitting.

    It has if it is below a quarter of the best earlier share p, where p is above chance (1 / classes) and the fall exceeds three standard
    errors, 3 sqrt(p (1 - p) / images). In the first epochs, while little is learned, shares rise and fall by half without any harm.

    Args:
        shares: of all epochs, in [0, 1].
        images: number of validation images.
    """
    *earlier, now = shares
    best = max(earlier, default=0.0)
    return best > 1 / classes and now < best / 4 and best - now > 3 * math.sqrt(best * (1 - best) / images)
