"""Dual batch norms: separate statistics for clean and for adversarial batches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
