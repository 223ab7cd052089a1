"""The cost of a training, counted while it runs: forward and backward passes of the encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

GRADIENT_STEPS = "train/gradient_steps"  # key of an epoch's record


@dataclass
class Count:
    """Images, views and adversarial examples that went through the encoder forwards and backwards."""

    images: int = 0


@contextlib.contextmanager
def counted(encoder: nn.Module) -> Iterator[Count]:
    """Within: counts images whose pass leaves a gradient, with respect to weights of the encoder or to the images themselves."""
    count = Count()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            count.images += len(inputs[0])

    handle = encoder.register_forward_hook(note)
    try:
        yield count
    finally:
        handle.remove()
