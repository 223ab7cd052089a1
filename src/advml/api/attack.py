"""PGD with a threat model on any module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from advml.api.models import BATCH, machine_of
from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.pgd import Adversary, default_step_size
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.core.device import Machine, derived_seed, deterministic_kernels
from advml.data.datasets import Split
from advml.data.tensors import checked, require
from advml.models.network import eval_mode
from advml.training.losses import classification_objective


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: float,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    step_size: float | None = None,
    random_start: bool = True,
    objective: Literal["ce", "margin", "dlr"] = "ce",
    momentum: float = 0.0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    keep: Literal["best", "last"] = "best",
    seed: int = 0,
    batch_size: int = BATCH,
) -> Tensor:
    """Projected gradient ascent on an objective of the classifier (Madry et al. 2018): x <- project(x + step_size * steepest(gradient)).

    Random starts are drawn per image, so the result for an image does not depend on the batch, up to rounding.

    Args:
        model: maps float images in [0, 1] to logits; attacked in eval mode.
        images: (N, C, H, W), float in [0, 1] or uint8.
        labels: (N,) true classes, whose objective is maximised; None: the classes that the model predicts.
        epsilon: radius of the ball, in units of the norm of images in [0, 1]; 8/255 is eight grey levels.
        norm: "linf" or "l2".
        steps: number of gradient steps. FGSM is `steps=1, step_size=epsilon, random_start=False`.
        step_size: in units of the norm; None: 2.5 * epsilon / steps.
        random_start: start from a random point of the ball; False: from the image.
        objective: "ce" cross-entropy, "margin", or "dlr" (Croce & Hein 2020).
        momentum: weight of earlier gradients in a step.
        schedule: of the step size.
        keep: the "best" iterate of each image, or the "last".
        seed: of random starts.
        batch_size: number of images attacked at a time.
    Returns:
        Adversarial images (N, C, H, W), float32 in [0, 1], on the device of `images`.
    Raises:
        UserError: images outside of [0, 1], labels that do not match the images or the logits, or invalid settings.

    Example:
        >>> adversarial = advml.attack(model, images, labels, epsilon=0.1, steps=5)
        >>> bool((adversarial - images).abs().max() <= 0.1 + 1e-6)
        True
    """
    require(norm in NORMS, f"norm = {norm!r}; choose from {', '.join(NORMS)}")
    require(0 < epsilon < float("inf"), f"epsilon = {epsilon!r} must be above 0; images live in [0, 1], so 8/255 is eight grey levels")
    require(norm != "linf" or epsilon <= 1, f"epsilon = {epsilon!r} exceeds the whole range of a pixel; write 8/255 for eight grey levels")
    for name, value in {"steps": steps, "batch_size": batch_size}.items():
        require(value >= 1, f"{name} = {value} must be at least 1")
    size = default_step_size(epsilon, steps) if step_size is None else step_size
    require(size > 0, f"step_size = {step_size!r} must be above 0")
    adversary = Adversary(ThreatModel(norm, epsilon), steps, size, random_start, keep, momentum=momentum, schedule=schedule)
    machine, generator = machine_of(model), PerImageGenerator(derived_seed("attack", seed))
    given = checked(images, labels)

    def attacked(batch: Tensor, target: Tensor) -> Tensor:
        aim = classification_objective(model, target.to(machine.device), objective)
        return adversary.attack(model, lambda: aim, machine.images(batch), generator=generator)

    with eval_mode(model), deterministic_kernels():
        targets = given.labels if labels is not None else _predicted(model, given, machine, batch_size)
        found = map(attacked, given.images.split(batch_size), targets.split(batch_size))
        return torch.cat(list(found)).contiguous().to(images.device)


def _predicted(model: nn.Module, split: Split, machine: Machine, batch_size: int) -> Tensor:
    """Classes (N,) that the model predicts."""
    with torch.no_grad():
        return torch.cat([model(machine.images(batch)).argmax(1).cpu() for batch in split.images.split(batch_size)])
