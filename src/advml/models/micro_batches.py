"""Pass a batch through an encoder in parts, to save memory of activations; losses use the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from advml.core import ranks
from advml.models.layers import DualBatchNorm, batch_norms


def in_parts(encode: Callable[[Tensor], Tensor], images: Tensor, *, size: int, layers: nn.Module) -> Tensor:
    """Features (N, D) of images (N, C, H, W), `size` at a time; the backward pass recomputes each part's activations.

    So a contrastive loss of thousands of images needs the memory of `size` images, and a second forward pass (Gao et al. 2021, GradCache).
    Batch norms in train mode see `size` images at a time, and update their statistics once. Parts have nearly equal sizes; if a batch norm
    is in train mode, at least two images, because it cannot normalise a single value: three images at size 2 are one part.

    If P processes share the batch (`core.ranks`), `size` is the total over all of them, and each computes its images of every part; parts
    have at least 2 P - 1 images, of which each process has one.

    Args:
        encode: maps images to features.
        layers: the module with the batch norms.
    """
    modes = _modes(layers)
    total = ranks.batch_size(len(images))
    fewest = max(2 if any(modes[0].values()) else 1, 2 * ranks.count() - 1)
    passes = ranks.passes(len(images), max(1, min(-(-total // size), total // fewest)), images.device)
    features = []
    for part, rows in zip(images.split([len(rows.own) for rows in passes]), passes, strict=True):
        contexts = ranks.computing(rows), _again(layers, modes, rows)
        features.append(checkpoint(encode, part, use_reentrant=False, context_fn=lambda both=contexts: both))
    return torch.cat(features)


class InParts(nn.Module):
    """Wrapper that passes images through a module `size` at a time."""

    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = module, size

    def forward(self, images: Tensor) -> Tensor:
        return in_parts(self.module, images, size=self.size, layers=self.module)


_recomputing = 0


def recomputing() -> bool:
    """Whether the current pass recomputes a part for the backward pass."""
    return _recomputing > 0


Modes = tuple[dict[nn.Module, bool], dict[DualBatchNorm, bool]]


def _modes(layers: nn.Module) -> Modes:
    """Batch norms in train mode, and the statistics that dual ones use."""
    duals = {layer: layer.use_clean for layer in layers.modules() if isinstance(layer, DualBatchNorm)}
    return {layer: layer.training for layer in batch_norms(layers)}, duals


def _set(modes: Modes) -> None:
    for layer, training in modes[0].items():
        layer.training = training
    for layer, clean in modes[1].items():
        layer.use_clean = clean


@contextlib.contextmanager
def _again(layers: nn.Module, modes: Modes, rows: ranks.Pass) -> Iterator[None]:
    """Context manager: batch norms are in the modes of the first pass, and do not update their statistics."""
    now, learning = _modes(layers), [layer for layer, training in modes[0].items() if training and layer.track_running_stats]
    momentum, counts = [layer.momentum for layer in learning], [layer.num_batches_tracked.clone() for layer in learning]
    global _recomputing
    _recomputing += 1
    _set(modes)
    for layer in learning:
        layer.momentum = 0.0
    try:
        with ranks.computing(rows, again=True):
            yield
    finally:
        _recomputing -= 1
        for layer, weight, count in zip(learning, momentum, counts, strict=True):
            layer.momentum = weight
            layer.num_batches_tracked.copy_(count)
        _set(now)
