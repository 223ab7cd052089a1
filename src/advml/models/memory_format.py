"""Memory format of a network's weights and features: channels last, unless PyTorch's convolutions are unsafe in it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

# Number of input channels per block in oneDNN's 1 x 1 convolutions (8 under AVX2, 16 under AVX-512).
BLOCK = 16


def place(module: Module, device: torch.device) -> Module:
    """Move a module to a device, with its weights in the best memory format; returns the module itself."""
    return module.to(device=device, memory_format=memory_format(module))


def memory_format(module: nn.Module) -> torch.memory_format:
    """Channels last, which is faster; contiguous if a convolution of the module is unsafe in channels last, or has three dimensions.

    A 1 x 1 convolution of stride 2 or more on fewer than `BLOCK` input channels is unsafe: its gradient with respect to the weights is
    written beyond the end of a buffer, with segmentation faults, hangs, or silently wrong gradients, depending on processor, threads,
    image size and batch (oneDNN 3.13.3, as in PyTorch 2.15; https://github.com/uxlfoundation/oneDNN/issues/6035). Observed with 1 to 7
    channels under AVX2, and with 1 to 15, for images of 96 pixels or more, under AVX-512; not with more channels, with stride 1,
    with larger kernels, or in contiguous format.
    To check again, on any processor with AVX2:

        ONEDNN_MAX_CPU_ISA=AVX2 python -c "import torch; from torch import nn
        network = nn.Conv2d(3, 48, 1, stride=2).to(memory_format=torch.channels_last)
        for _ in range(3): network(torch.rand(40, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()"

    The result depends only on the module, not on the device, so that a model computes the same on every machine.
    """
    unsafe = any(isinstance(layer, nn.Conv3d) or (isinstance(layer, nn.Conv2d) and _unsafe(layer)) for layer in module.modules())
    return torch.contiguous_format if unsafe else torch.channels_last  # weights of 5 dimensions do not support channels last


def _unsafe(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels // layer.groups < BLOCK
