"""Layers with special treatment in training: dual batch norms, batch norms in general, blocks by depth."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Dual batch norms: separate statistics for clean and for adversarial batches.


class DualBatchNorm(nn.Module):
    """Batch norm with two sets of statistics: for clean batches, and for adversarial batches and inference (Xie et al. 2020)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.adversarial = layer
        self.clean = copy.deepcopy(layer)
        self.use_clean = False

    def forward(self, features: Tensor) -> Tensor:
        return (self.clean if self.use_clean else self.adversarial)(features)


def dual(module: nn.Module) -> nn.Module:
    """Replace every batch norm below `module`, in place."""
    for name, child in module.named_children():
        setattr(module, name, DualBatchNorm(child) if isinstance(child, _BatchNorm) else dual(child))
    return module


@contextlib.contextmanager
def clean_statistics(network: nn.Module) -> Iterator[None]:
    """Context manager: dual batch norms use (and update) the clean statistics; single ones are unaffected."""
    duals = [module for module in network.modules() if isinstance(module, DualBatchNorm)]
    for module in duals:
        module.use_clean = True
    try:
        yield
    finally:
        for module in duals:
            module.use_clean = False


# Layers by kind and by depth


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All batch norms in a module, both halves of dual ones included."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def knows_blocks(encoder: nn.Module) -> bool:
    """Whether timm defines the blocks of this encoder, as needed by `depths`."""
    return hasattr(encoder, "group_matcher")


def depths(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """Depth from the top of each parameter of a timm encoder: 1 in its last block (and layers after it), more in earlier blocks.

    Blocks are defined by timm: residual blocks, transformer layers; stem and embeddings come first.
    """
    blocks = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)  # name -> block number, from the input
    top = max(blocks.values(), default=0)
    return {parameter: 1 + top - blocks[name] for name, parameter in encoder.named_parameters()}
