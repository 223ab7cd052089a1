"""What attacks cost: images that pass forward through a network, and gradients that come back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from advml.networks.models import Network

PASSES = ("forward", "backward")


@contextlib.contextmanager
def counted(network: nn.Module) -> Iterator[dict[str, int]]:
    """Within: the images that pass forward through the network's encoder, and the gradients that come back."""
    passes = dict.fromkeys(PASSES, 0)

    def backward(gradient: Tensor) -> None:
        passes["backward"] += len(gradient)

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passes["forward"] += len(inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(backward)

    handle = (network.encoder if isinstance(network, Network) else network).register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()
