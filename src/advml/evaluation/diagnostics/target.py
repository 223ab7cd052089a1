"""Anyone's model as the target of an attack that must not fail, leave traces, or go uncounted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from advml.attacks.pgd import Objective
from advml.errors import UserError

Loss = Callable[[Tensor], Tensor]  # logits (N, K) -> values (N,)


class Target:
    """A private copy of a model, in eval mode. The model itself is never run, so nothing of it can change.

    Some models give no gradient: they round, detach, or compute outside of PyTorch. Here that is a gradient of zero.

    Attributes:
        forward, backward: images that have passed so far.
        error: why a gradient could not be computed, in PyTorch's words; None if every one could.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
        except (RuntimeError, TypeError) as error:  # a tensor with a history, a handle of the operating system
            reason = str(error).splitlines()[0]
            raise UserError(f"the model cannot be copied ({reason}); keep results and open files out of its attributes") from None
        self.forward = self.backward = 0
        self.error: str | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K), in float32."""
        self.forward += len(images)
        return self.model(images.clone()).float()  # clone: a model may write into its input

    def gradient(self, loss: Loss, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), values (N,) of `loss(logits)`, and their gradient with respect to the images, zero or non-finite as it may be."""
        images = images.detach().requires_grad_()
        gradient = None
        try:
            with torch.enable_grad():
                self.forward += len(images)
                logits = self.model(images.clone()).float()
                values = loss(logits)
                if values.requires_grad:
                    self.backward += len(images)
                    with torch.autocast(images.device.type, enabled=False):  # as in `pgd`
                        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        except torch.OutOfMemoryError:  # is a RuntimeError, and says nothing about the model
            raise
        except RuntimeError as error:
            self.error = str(error).splitlines()[0]
            with torch.no_grad():
                logits = self.logits(images.detach())
                values = loss(logits)
        return logits.detach(), values.detach(), torch.zeros_like(images.detach()) if gradient is None else gradient

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
                gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)
                slope = ((images - images.detach()) * gradient).flatten(1).sum(1)  # 0, with that gradient
            values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            watch(logits)
            return values + slope

        return objective
