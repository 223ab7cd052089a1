"""Projected gradient ascent (PGD), for training and evaluation.

FGSM is `steps=1` with `step_size=epsilon`; threat model I and II differ only in the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.per_image_rng import Randomness
from advml.attacks.threat_model import ThreatModel
from advml.models.network import under_attack

Objective = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] -> values (N,), to be made large
FP16_SCALE = 256.0  # of the objective under fp16, whose smallest number is 6e-8; a power of 2 rounds nothing


# Fraction of the steps done, in [0, 1) -> fraction of the step size. Never exactly 0, which would waste a step.
STEP_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def default_step_size(epsilon: float, steps: int) -> float:
    """2.5 * epsilon / steps: enough to reach and travel the boundary from any start (Madry et al. 2018, app. B)."""
    return epsilon if steps == 1 else 2.5 * epsilon / steps


def pgd(
    objective: Objective,
    images: Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    step_size: float | None = None,
    start: Tensor | None = None,
    keep: Literal["last", "best"] = "last",
    momentum: float = 0.0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
) -> Tensor:
    """Maximise `objective` inside `threat_model`: x <- project(x + step_size * steepest(grad objective(x))).

    With momentum m (Dong et al. 2018, eq. 6) the ascent follows v <- m * v + g / mean|g|, per image, instead of the gradient g;
    the paper divides by the sum, which leaves the direction the same. Under a schedule, step k of n is step_size * schedule(k / n) long.

    Entries of a gradient that are not finite are set to 0. Takes exactly `steps` gradients, with respect to the images alone;
    `keep="best"` costs one more forward pass, for the value of the last iterate. Parameter gradients are neither computed nor changed.

    Args:
        objective: maps images (N, C, H, W) in [0, 1] to values (N,). Values may couple the batch (contrastive).
        images: (N, C, H, W) in [0, 1].
        threat_model: ball and box that bound the perturbation.
        steps: number of gradient steps, at least 1.
        step_size: length of a step in the norm; None: 2.5 * epsilon / steps.
        start: first iterate, e.g. `threat_model.random_start(...)`; None: the images themselves.
        keep: "last" iterate, or per image the "best" one seen, the start included.
        momentum: weight m >= 0 of earlier gradients; 0: none.
        schedule: of the step size, a key of STEP_SCHEDULES.
    Returns:
        Adversarial images (N, C, H, W), detached, inside the threat model.
    """
    step_size = default_step_size(threat_model.epsilon, steps) if step_size is None else step_size
    images = images.detach()
    adversarial = (images if start is None else start).detach()  # a tensor of its own, to be switched to requires_grad
    best = Best() if keep == "best" else None
    scale = FP16_SCALE if torch.is_autocast_enabled(kind := images.device.type) and torch.get_autocast_dtype(kind) == torch.float16 else 1.0
    velocity: Tensor | None = None
    for step in range(steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            values = objective(adversarial)
            with torch.autocast(kind, enabled=False):  # it would round the float32 parts of a backward pass too
                (gradient,) = torch.autograd.grad(values, adversarial, torch.full_like(values, scale))
        gradient = gradient if scale == 1 else gradient / scale
        gradient, adversarial, values = finite(gradient), adversarial.detach(), values.detach()  # and the graph is gone
        if best:
            best.update(adversarial, values)
        if momentum:
            gradient = velocity = accumulate(velocity, gradient, momentum=momentum)
        adversarial = threat_model.ascend(adversarial, gradient, images, step_size=step_size * STEP_SCHEDULES[schedule](step / steps))
    if best:
        with torch.no_grad():
            best.update(adversarial, objective(adversarial))
        return best.images
    return adversarial


def finite(gradient: Tensor) -> Tensor:
    """Replace NaN and infinity in a gradient by zeros: they would move an image out of ball and box."""
    return gradient.nan_to_num(nan=0, posinf=0, neginf=0)


def accumulate(velocity: Tensor | None, gradient: Tensor, *, momentum: float) -> Tensor:
    """Momentum update m * v + g / mean|g| (N, C, H, W), with the mean per image; a zero gradient adds nothing."""
    size = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
    direction = gradient / size.view(-1, *[1] * (gradient.ndim - 1))
    return direction if velocity is None else momentum * velocity + direction


class Best:
    """Keep, per image, the iterate with the largest value so far."""

    images: Tensor
    values: Tensor | None = None

    def update(self, images: Tensor, values: Tensor) -> None:
        """Keep those images (N, C, H, W) whose values (N,) exceed the largest so far."""
        if self.values is None:
            self.images, self.values = images, values
            return
        better = values > self.values
        self.values = torch.where(better, values, self.values)
        self.images = torch.where(better.view(-1, *[1] * (images.ndim - 1)), images, self.images)


# PGD with its settings, applied to a network, in training and in evaluation


@dataclass(frozen=True)
class Adversary:
    """Settings of a PGD attack, without its objective.

    Attributes:
        threat_model: ball and box.
        steps, random_start, keep: as in `pgd`.
        step_size: as in `pgd`; None becomes the default, so that records contain the length.
        mode: of the network during the attack; "eval" does not update batch-norm statistics.
        momentum, schedule: as in `pgd`.
    """

    threat_model: ThreatModel
    steps: int
    step_size: float | None
    random_start: bool
    keep: Literal["last", "best"]
    mode: Literal["eval", "train"] = "eval"
    momentum: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if self.step_size is None:
            object.__setattr__(self, "step_size", default_step_size(self.threat_model.epsilon, self.steps))

    def scaled(self, share: float) -> Adversary:
        """Copy of this attack with epsilon and step size multiplied by `share`."""
        if share == 1:
            return self
        threat_model = replace(self.threat_model, epsilon=share * self.threat_model.epsilon)
        return replace(self, threat_model=threat_model, step_size=share * self.step_size)

    def attack(self, network: nn.Module, objective: Callable[[], Objective], images: Tensor, *, generator: Randomness) -> Tensor:
        """Adversarial images (N, C, H, W) for `network`; gradients, modes, statistics and global RNG are restored.

        Args:
            network: frozen and in `mode` during the attack.
            objective: builds the objective; called once, with the network frozen and in `mode`, so that it can compute what is constant
                over the steps (such as the clean embedding).
            images: (N, C, H, W) in [0, 1].
            generator: of the random starts: a `torch.Generator` for the batch, or a `PerImageGenerator`.
        """
        with under_attack(network, mode=self.mode):
            start = self.threat_model.random_start(images, generator=generator) if self.random_start else None
            return pgd(
                objective(),
                images,
                threat_model=self.threat_model,
                steps=self.steps,
                step_size=self.step_size,
                start=start,
                keep=self.keep,
                momentum=self.momentum,
                schedule=self.schedule,
            )


def training_adversary(spec: config.TrainAttack, threat: config.ThreatModelSection, phase: config.Phase | None = None) -> Adversary:
    """Attack of adversarial training, which keeps the last iterate; a phase may set its own epsilon and number of steps."""
    epsilon, steps = threat.epsilon, spec.steps
    if phase is not None:
        epsilon, steps = phase.epsilon or epsilon, phase.attack_steps or steps
    return Adversary(
        threat_model=ThreatModel(threat.norm, epsilon),
        steps=steps,
        step_size=spec.step_size,
        random_start=spec.random_start,
        keep="last",
        mode=spec.batch_norm,
    )


def evaluation_adversary(spec: config.EvaluationAttack, threat: config.ThreatModelSection, *, share: float = 1.0) -> Adversary:
    """PGD attack of `evaluate`, at `share` times its epsilon, which is `evaluate.epsilon` or else that of training."""
    epsilon = share * (spec.epsilon or threat.epsilon)
    return Adversary(
        threat_model=ThreatModel(threat.norm, epsilon),
        steps=spec.steps,
        step_size=spec.step_size,
        random_start=spec.random_start,
        keep=spec.keep,
        momentum=spec.momentum,
        schedule=spec.schedule,
    )
