"""Batch norms folded into the convolutions before them, while both are constant: a sixth less work per attack."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Kinds of batch norm -> what is left of their forward pass once the affine part sits in the convolution.
REST: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.BatchNorm2d: lambda norm, features: features,
    BatchNormAct2d: lambda norm, features: norm.act(norm.drop(features)),
}


@contextlib.contextmanager
def folded(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Within: every convolution whose output goes to one batch norm, and nowhere else, does that norm's work.

    The network computes the same function up to rounding. It must be in eval mode, and neither statistics nor
    parameters may change within, nor take gradients: constants are computed on entry.

    Args:
        network: its modules' `forward` is replaced for the time being, nothing else.
        images: (1, C, H, W); pass through the network once, to see who follows whom.
    """
    pairs = _pairs(network, images)
    try:
        for convolution, norm in pairs:
            weight, bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            convolution.forward = lambda x, c=convolution, w=weight.detach(), b=bias.detach(): c._conv_forward(x, w, b)
            norm.forward = lambda x, n=norm: REST[type(n)](n, x)
        yield
    finally:
        for module in (module for pair in pairs for module in pair):
            vars(module).pop("forward", None)


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Convolutions and the batch norms that alone read their outputs, from the autograd graph of one image."""
    made: dict[object, nn.Conv2d] = {}  # graph node -> the convolution that made it
    read: list[tuple[object, nn.Module]] = []  # the node that a batch norm reads, the norm
    hooks = [m.register_forward_hook(lambda m, _, out: made.update({out.grad_fn: m})) for m in network.modules() if type(m) is nn.Conv2d]
    hooks += [m.register_forward_pre_hook(lambda m, x: read.append((x[0].grad_fn, m))) for m in network.modules() if type(m) in REST]
    try:
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            output = network.features(images.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    readers, calls = _readers(output), Counter([*made.values(), *(norm for _, norm in read)])
    return [(made[node], norm) for node, norm in read if node in made and readers[node] == calls[made[node]] == calls[norm] == 1]


def _readers(output: Tensor) -> Counter[object]:
    """How often each node of the graph behind `output` is read."""
    readers: Counter[object] = Counter()
    todo, seen = [output.grad_fn], {output.grad_fn}
    while todo:
        for node, _ in todo.pop().next_functions:
            readers[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return readers
