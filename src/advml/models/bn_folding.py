"""Fold batch norms into the convolutions before them, while statistics and parameters are constant, as during an attack."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from advml.models.layers import DualBatchNorm, batch_norms

Layer = Callable[[Tensor], Tensor]
Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
Names = list[tuple[str, str]]  # (convolution, batch norm) of each pair

# Kind of batch norm -> the rest of its forward pass after folding. Other kinds are not folded.
LEFT: dict[type[nn.Module], Callable[[nn.Module], Layer]] = {
    nn.BatchNorm2d: lambda norm: lambda features: features,
    BatchNormAct2d: lambda norm: lambda features: norm.act(norm.drop(features)),
}

# Cache: module -> its layers when pairs were searched, and the pairs' names. A search takes as long as an attack on a small network.
_known: WeakKeyDictionary[nn.Module, tuple[list[tuple[str, type]], Names]] = WeakKeyDictionary()


@contextmanager
def folded(module: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Context manager that folds batch norms in eval mode into preceding convolutions: w' = w * scale, b' = b * scale + shift.

    The function stays the same up to rounding. A gradient with respect to the images costs a fifth less on a ResNet, because PyTorch's
    batch norm on the CPU also computes gradients of weight and bias, needed or not. Parameters and buffers are not modified, and must
    not change inside; parameters of folded pairs get no gradient.

    Not folded: batch norms in train mode; dual ones, which may switch statistics inside; those that do not follow a convolution, or one
    whose output is also used elsewhere, e.g. by a hook; and all of a module that `torch.fx` cannot trace, or traces wrongly.

    Args:
        module: maps images (N, C, H, W) to features.
        shape: (C, H, W).
    """
    pairs = [(module.get_submodule(conv), module.get_submodule(norm)) for conv, norm in _names(module, shape)]
    with _fold([pair for pair in pairs if _free(*pair)]):
        yield


def _free(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a pair has no hooks and no replaced `forward`; `weight_norm` and `prune` compute weights in hooks."""
    watched = conv._forward_hooks or norm._forward_pre_hooks or "weight" not in conv._parameters
    return not (watched or norm.training or "forward" in vars(conv) or "forward" in vars(norm))


@contextmanager
def _fold(pairs: Sequence[Pair]) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode cannot be part of a backward pass
        constants = [_fused(conv, norm) for conv, norm in pairs]
    try:
        for (conv, norm), (weight, bias) in zip(pairs, constants, strict=True):
            conv.forward = _Override(conv, partial(conv._conv_forward, weight=weight, bias=bias))
            norm.forward = _Override(norm, LEFT[type(norm)](norm))
        yield
    finally:
        for layer in (layer for pair in pairs for layer in pair):
            vars(layer).pop("forward", None)


@dataclass(frozen=True)
class _Override:
    """Temporary `forward` of a layer. A deep copy gets the original `forward`, because it has weights of its own."""

    layer: nn.Module
    act: Layer

    def __call__(self, features: Tensor) -> Tensor:
        return self.act(features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return MethodType(type(self.layer).forward, copy.deepcopy(self.layer, memo))


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    fused = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = (tensor.detach() for tensor in fused)
    return weight, bias


def _names(module: nn.Module, shape: Sequence[int]) -> Names:
    layers = [(name, type(layer)) for name, layer in module.named_modules()]
    if module not in _known or _known[module][0] != layers:
        _known[module] = layers, _found(module, shape) if any(kind in LEFT for _, kind in layers) else []
    return _known[module][1]


class _Tracer(fx.Tracer):
    """Tracer that treats batch norms as single nodes, including timm's with an activation, and dual ones."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | DualBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _found(module: nn.Module, shape: Sequence[int]) -> Names:
    """Search and test the pairs of a module in a copy, because tracing has side effects and calls hooks."""
    try:
        tried = _stranger(module)
        names = _traced(tried)
        return names if _same(tried, names, shape) else []
    except Exception:  # e.g. control flow that depends on the images, or a model that cannot be copied
        return []


def _stranger(module: nn.Module) -> nn.Module:
    """Copy of a module without hooks, in double precision, with batch norms that all differ from the identity."""
    generator = torch.Generator().manual_seed(0)
    tried = copy.deepcopy(module).cpu().double().eval()
    for layer in tried.modules():
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            hooks.clear()
    for layer in batch_norms(tried):
        for tensor in filter(torch.is_floating_point, [*layer.parameters(), *layer.buffers()]):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return tried


def _traced(module: nn.Module) -> Names:
    """Pairs of a convolution and a batch norm, each used once, where the convolution's output only goes into the batch norm."""
    optional = list(inspect.signature(module.forward).parameters.values())[1:]
    given = {each.name: each.default for each in optional if each.default is not each.empty}  # defaults, as in a call with the images only
    calls = [node for node in _Tracer().trace(module, concrete_args=given).nodes if node.op == "call_module"]
    used = [module.get_submodule(node.target) for node in calls]
    layers = dict(zip(calls, used, strict=True))
    names = []
    for node, norm in layers.items():
        before = node.args[0] if node.args else None
        conv = layers.get(before)
        alone = conv is not None and list(before.users) == [node] and used.count(conv) == used.count(norm) == 1
        if alone and type(conv) is nn.Conv2d and type(norm) in LEFT and norm.running_mean is not None:
            names.append((before.target, node.target))
    return names


@torch.no_grad()
def _same(module: nn.Module, names: Names, shape: Sequence[int]) -> bool:
    """Whether the module's output, in double precision, is the same with folded pairs; the tracer may have followed another path."""
    images = torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = module(images)
    with _fold([(module.get_submodule(conv), module.get_submodule(norm)) for conv, norm in names]):
        found = module(images)
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
