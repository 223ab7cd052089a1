"""Layers by kind and by depth: what a training phase treats apart."""

from __future__ import annotations

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
