"""PGD with a threat model on any module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from advml import config
from advml.api.models import BATCH, adapted, machine_of
from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.pgd import evaluation_adversary
from advml.core.device import derived_seed, deterministic_kernels
from advml.core.errors import UserError
from advml.data.tensors import Batches, checked, labelled, require
from advml.models.network import eval_mode
from advml.training.losses import classification_objective


def attack(
    model: nn.Module,
    images: Tensor | Batches,
    labels: Tensor | None = None,
    *,
    epsilon: float | str,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    step_size: float | str | None = None,
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
        model: maps float images in [0, 1] to logits; attacked in eval mode. As in `evaluate`, logits are found in dictionaries and tuples,
            and float64 and bf16 models get images of their type.
        images: (N, C, H, W), float in [0, 1] or uint8; or batches of (images, labels), such as a DataLoader, which are joined.
        labels: (N,) true classes, whose objective is maximised; None: the classes that the model predicts.
        epsilon: radius of the ball, in units of the norm of images in [0, 1]; 8/255 or "8/255" is eight grey levels.
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
        Adversarial images (N, C, H, W), float32 in [0, 1], on the device of `images` (of batches: on the CPU).
    Raises:
        UserError: images outside of [0, 1], labels that do not match the images or the logits, a model that fails or has no gradient, or
            invalid settings.

    Example:
        >>> adversarial = advml.attack(model, images, labels, epsilon=0.1, steps=5)
        >>> bool((adversarial - images).abs().max() <= 0.1 + 1e-6)
        True
    """
    given = {"steps": steps, "step_size": step_size, "random_start": random_start, "objective": objective, "momentum": momentum}
    given |= {"schedule": schedule, "keep": keep, "seed": seed, "batch_size": batch_size}
    spec = config.section(config.EvaluationAttack, given)
    adversary = evaluation_adversary(spec, config.section(config.ThreatModelSection, {"norm": norm, "epsilon": epsilon}))
    require(norm != "linf" or adversary.threat_model.epsilon <= 1, f"epsilon = {epsilon} exceeds the whole range of a pixel; write 8/255")
    machine, generator = machine_of(model), PerImageGenerator(derived_seed("attack", spec.seed))
    known = labels is not None or not isinstance(images, Tensor)
    split = labelled(images, labels) if known else checked(images)  # type: ignore[arg-type]
    with eval_mode(model), deterministic_kernels():
        network = adapted(model, machine, split)[0].network

        def attacked(batch: Tensor, target: Tensor) -> Tensor:
            shown = machine.images(batch)
            with torch.no_grad():
                aim = classification_objective(network, target.to(machine.device) if known else network(shown).argmax(1), spec.objective)
            found = adversary.attack(network, lambda: aim, shown, generator=generator)
            if getattr(network, "disconnected", False):
                reason = network.gradient_error or "its logits are not connected with the images by autograd"
                raise UserError(f"the model has no gradient, which the attack needs: {reason}")
            return found

        found = map(attacked, split.images.split(spec.batch_size), split.labels.split(spec.batch_size))
        return torch.cat(list(found)).contiguous().to(images.device if isinstance(images, Tensor) else "cpu")
