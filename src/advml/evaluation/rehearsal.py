"""A model is tried before hours are spent on it: on the largest batch that it will get and on a single image, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advml.attacks.guard import borrowed
from advml.errors import UserError
from advml.runtime.machine import Machine, own_randomness


def rehearse(network: nn.Module, images: Tensor, machine: Machine, *, classes: int) -> None:
    """Try a copy of the network on all images (N, C, H, W), and on the first alone.

    Raises:
        UserError: it does not give a logit per class and image, for batches of any size.
    """
    for batch in (images, images[:1]):
        with own_randomness(0, images.device), borrowed(network) as own, torch.enable_grad():
            asked = batch.detach().clone().requires_grad_()
            with machine.autocast():
                logits = own(asked)
            found = tuple(logits.shape)
            if found != (len(batch), classes):
                raise UserError(
                    f"the model gives {found} for {len(batch)} images; attacks need ({len(batch)}, {classes}): a logit per class"
                )
            if logits.requires_grad:
                torch.autograd.grad(logits.float().sum(), asked, allow_unused=True)
