"""The cost of a training, counted while it runs: forward and backward passes of the encoder."""

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
    """Images, views and adversarial examples that went through the encoder forwards and backwards."""

    images: int = 0


@contextlib.contextmanager
def counted(network: Network) -> Iterator[Count]:
    """Within: counts images whose pass leaves a gradient, with respect to weights of the encoder or to the images themselves."""
    count = Count()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        learns = any(parameter.requires_grad for parameter in network.encoder.parameters())
        if torch.is_grad_enabled() and (output.requires_grad or learns):
            count.images += len(output)

    handle = network.normalize.register_forward_hook(note)  # not of the encoder, which may be compiled
    try:
        yield count
    finally:
        handle.remove()
