"""Anyone's model as the target of an attack that must not fail or go uncounted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advml.attacks.pgd import Objective, finite
from advml.networks.foreign import Foreign

Loss = Callable[[Tensor], Tensor]  # logits (N, K) -> values (N,)


class Target:
    """A model as given, which must be in eval mode and frozen, behind a wall: see `Foreign`.

    Some models give no gradient: they round, detach, or compute outside of PyTorch. Here that is a gradient of zero.

    Attributes:
        forward, backward: images that have passed so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model if isinstance(model, Foreign) else Foreign(model, memory_format=torch.preserve_format)
        self.model.gradient_error = None
        self.forward = self.backward = 0

    @property
    def error(self) -> str | None:
        """Why a gradient could not be computed, in its own words; None if every one could."""
        return self.model.gradient_error

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K), in float32."""
        self.forward += len(images)
        return self.model(images).float()

    def gradient(self, loss: Loss, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), values (N,) of `loss(logits)`, and their gradient with respect to the images, zero or non-finite as it may be."""
        images = images.detach().requires_grad_()
        self.forward += len(images)
        self.backward += len(images)
        with torch.enable_grad():
            logits = self.model(images).float()
            values = loss(logits)
            with torch.autocast(images.device.type, enabled=False):  # as in `pgd`
                (gradient,) = torch.autograd.grad(values.sum(), images)
        return logits.detach(), values.detach(), gradient

    def objective(self, loss: Loss, *, watch: Callable[[Tensor], None] = lambda logits: None) -> Objective:
        """For `pgd`: values of `loss`. Non-finite parts of a gradient are 0, and a value of NaN is -inf: never the best.

        Args:
            watch: is shown the logits (N, K) of every iterate.
        """

        def objective(images: Tensor) -> Tensor:
            if not images.requires_grad:
                logits, slope = self.logits(images), 0
                values = loss(logits)
            else:
                logits, values, gradient = self.gradient(loss, images)
                slope = ((images - images.detach()) * finite(gradient)).flatten(1).sum(1)  # 0, with that gradient
            values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            watch(logits)
            return values + slope

        return objective
