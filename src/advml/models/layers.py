"""Layers that training treats apart: dual batch norms, batch norms in general, blocks by their depth."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Dual batch norms: separate statistics for clean and for adversarial batches.


class DualBatchNorm(nn.Module):
    """Two sets of statistics: one for clean batches, one for adversarial batches and for inference (Xie et al. 2020)."""

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
    """Within: dual batch norms use (and update) the clean statistics. Nothing to do for single ones."""
    duals = [module for module in network.modules() if isinstance(module, DualBatchNorm)]
    for module in duals:
        module.use_clean = True
    try:
        yield
    finally:
        for module in duals:
            module.use_clean = False


# By kind and by depth.


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All batch norms in a module, both halves of dual ones included."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def knows_blocks(encoder: nn.Module) -> bool:
    """Whether timm can tell the blocks of this encoder, as `depths` needs."""
    return hasattr(encoder, "group_matcher")


def depths(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """How far from the top each parameter of a timm encoder lies: 1 in its last block (and what follows it), more below.

    Blocks are timm's own: residual blocks, transformer layers; stem and embeddings lie at the bottom.
    """
    blocks = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)  # name -> number, from the bottom
    top = max(blocks.values(), default=0)
    return {parameter: 1 + top - blocks[name] for name, parameter in encoder.named_parameters()}
