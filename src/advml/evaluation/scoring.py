"""Whether an example counts: what a copy of the model, which no attack can have touched, takes it for, and how far it lies.

A model that cannot be copied decides itself, and gets the flag `not_copied`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advml.attacks.threat import NORMS, ThreatModel
from advml.errors import Failure
from advml.runtime.machine import Machine

ROUNDING = 1e-5  # how far beyond the ball float32 may carry an honest attack
NOT_FINITE = -1  # the predicted class where the logits are no numbers: nobody's label, so a wrong one


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, machine: Machine) -> Tensor:
    """The class (N,) of each image, NOT_FINITE where the logits are no numbers."""
    with machine.autocast():
        logits = network(images)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NOT_FINITE)


@dataclass(frozen=True, eq=False)
class Scorer:
    """The copy that decides, and where it computes."""

    network: nn.Module
    machine: Machine

    def predict(self, images: Tensor) -> Tensor:
        """See `predict`."""
        return predict(self.network, images, self.machine)

    def judge(self, attack: str, adversarial: Tensor, images: Tensor, *, threat_model: ThreatModel) -> tuple[Tensor, Tensor]:
        """What the adversarial images (N, C, H, W) are taken for (N,), and their distances (N,) from the images.

        Raises:
            Failure: one of them lies outside of ball or box.
        """
        size, epsilon = NORMS[threat_model.norm].size(adversarial - images), threat_model.epsilon
        if not (size.max() <= epsilon + ROUNDING and adversarial.min() >= 0 and adversarial.max() <= 1):
            raise Failure(
                f"{attack} left its threat model: perturbations up to {float(size.max()):g} for epsilon {epsilon:g}, "
                f"pixels from {float(adversarial.min()):g} to {float(adversarial.max()):g}; its figures would mean nothing"
            )
        return self.predict(adversarial), size
