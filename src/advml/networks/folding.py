"""Batch norms folded into the convolutions before them, while statistics and parameters are constant, as they are under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from advml.networks.dual import DualBatchNorm

Layer = Callable[[Tensor], Tensor]
Pair = tuple[nn.Conv2d, nn.BatchNorm2d]

# Kind of batch norm -> what is left of it once its convolution has taken over the norm. Others stay as they are.
LEFT: dict[type[nn.Module], Callable[[nn.Module], Layer]] = {
    nn.BatchNorm2d: lambda norm: _same,
    BatchNormAct2d: lambda norm: lambda features: norm.act(norm.drop(features)),
}

_known: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()  # finding pairs takes longer than an attack on a small network


def _same(features: Tensor) -> Tensor:
    return features


@contextmanager
def folded(module: nn.Module) -> Iterator[None]:
    """Within: every batch norm in eval mode that follows a convolution is part of it: w' = w * scale, b' = b * scale + shift.

    The same function up to rounding. A gradient with respect to the images costs a quarter less on a ResNet than with PyTorch's batch
    norm, whose backward pass on the CPU also sums up the gradients of weight and bias, wanted or not. Parameters, buffers and
    hooks stay as they are; neither parameters nor statistics may change within, and no gradient reaches those of the pairs.

    Left as they are: batch norms in train mode, dual ones, which may change sides within, those that follow no convolution, or one that
    something else looks at, and all of a module that `torch.fx` cannot trace.
    """
    pairs = [(conv, norm) for conv, norm in _pairs(module) if not norm.training and "forward" not in vars(conv)]
    with torch.no_grad():
        constants = [_fused(conv, norm) for conv, norm in pairs]
    try:
        for (conv, norm), (weight, bias) in zip(pairs, constants, strict=True):
            conv.forward = partial(conv._conv_forward, weight=weight, bias=bias)
            norm.forward = LEFT[type(norm)](norm)
        yield
    finally:
        for layer in (layer for pair in pairs for layer in pair):
            vars(layer).pop("forward", None)


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    fused = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = (tensor.detach() for tensor in fused)
    return weight, bias


def _pairs(module: nn.Module) -> list[Pair]:
    if module not in _known:
        _known[module] = _found(module) if any(type(layer) in LEFT for layer in module.modules()) else []
    return _known[module]


class _Tracer(fx.Tracer):
    """Sees a batch norm as one piece, timm's with an activation and dual ones too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | DualBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _found(module: nn.Module) -> list[Pair]:
    """Convolutions whose output goes into a batch norm and nowhere else; each of the two is used once."""
    try:
        calls = [node for node in _Tracer().trace(module).nodes if node.op == "call_module"]
    except Exception:  # control flow that depends on the images, and whatever else a model may do to a tracer
        return []
    used = [module.get_submodule(node.target) for node in calls]
    layers = dict(zip(calls, used, strict=True))
    pairs = []
    for node, norm in layers.items():
        before = node.args[0] if node.args else None
        conv = layers.get(before)
        alone = conv is not None and list(before.users) == [node] and used.count(conv) == used.count(norm) == 1
        if alone and type(conv) is nn.Conv2d and type(norm) in LEFT and norm.running_mean is not None:
            pairs.append((conv, norm))
    return pairs
