"""Count the cost of a training while it runs: forward and backward passes of the encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advml.models.network import Network

GRADIENT_STEPS = "train/gradient_steps"  # key of an epoch's record


@dataclass
class Count:
    """Number of images, views and adversarial examples that passed the encoder forward and backward."""

    images: int = 0


@contextlib.contextmanager
def counted(network: Network) -> Iterator[Count]:
    """Context manager that counts images whose pass has a gradient with respect to the encoder's weights or the images."""
    count = Count()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        learns = any(parameter.requires_grad for parameter in network.encoder.parameters())
        if torch.is_grad_enabled() and (output.requires_grad or learns):
            count.images += len(output)

    handle = network.normalize.register_forward_hook(note)  # a hook on `normalize`, because the encoder may be compiled
    try:
        yield count
    finally:
        handle.remove()
