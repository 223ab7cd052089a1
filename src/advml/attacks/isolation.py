"""Restores random-number state, modes and gradients around attack libraries, and gives them a model in the form they expect."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advml.attacks.pgd import finite
from advml.core.errors import Failure
from advml.models.network import under_attack


def _generators() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """(read, write) of the state of every global generator that is in use."""
    found: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_initialized():
        found.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if torch.backends.mps.is_available():
        found.append((torch.mps.get_rng_state, torch.mps.set_rng_state))
    return found


@contextmanager
def isolated(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Within: `model` is frozen and in eval mode, and the global generators are seeded. After, or after an error: as it was.

    Attack libraries draw from the global generators, and call `backward()`, which would reach the parameters.

    Args:
        model: its `requires_grad` and training flags, and its parameters' gradients, are kept.
        seed: of Python's, NumPy's and torch's generators.
    """
    states = [(write, read()) for read, write in _generators()]
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        with under_attack(model), torch.inference_mode(False):
            yield
    finally:
        for write, state in states:
            write(state)
        if not torch.cuda.is_initialized():  # where CUDA starts later, it starts from the seed that was asked for last: the caller's
            torch.cuda.manual_seed_all(torch.initial_seed())


def copied(model: nn.Module) -> nn.Module:
    """A copy of the model; the model itself if it cannot be copied."""
    try:
        with torch.no_grad():  # copies of TorchScript's parameters would have a history
            return copy.deepcopy(model)
    except Exception:  # a foreign module may hold anything: a tensor with a history, a handle of the operating system
        return model


@contextmanager
def frozen_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Within: a copy of the model in eval mode, frozen. One that cannot be copied lends itself, and is as before afterwards."""
    own = copied(model)
    tensors = [*own.parameters(), *own.buffers()] if own is model else []
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        with under_attack(own):
            yield own
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


class Logits(nn.Module):
    """A model as libraries expect it: any batch in, logits (N, K) in float32 out, connected to the images.

    Libraries work on contiguous float32 images; the model gets the type and memory format of `like`. They write into the
    logits: these are a copy. They pass empty batches: no model sees one. They ask for the gradient of a model that ignores its
    images, or rounds them away: it is zero. What of a gradient is not finite is zero too.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        like: images as the model wants them.
        classes: K; None: whatever the model returns.
    Raises:
        Failure: when called, if the output is not (N, K).
    """

    def __init__(self, model: nn.Module, *, like: Tensor, classes: int | None = None) -> None:
        super().__init__()
        self.model, self.classes, self.dtype = model, classes, like.dtype
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.training = model.training  # of this module alone

    def forward(self, images: Tensor) -> Tensor:
        if not len(images) and self.classes is not None:
            return images.new_zeros(0, self.classes)
        asked = images.requires_grad and torch.is_grad_enabled()
        inputs = images.view_as(images)
        if asked:
            inputs.register_hook(finite)
        logits = self.model(inputs.to(self.dtype).contiguous(memory_format=self.memory_format)).float()
        if logits.ndim != 2 or len(logits) != len(images) or self.classes not in (None, logits.shape[1]):
            wanted = f"({len(images)}, {self.classes or 'classes'})"
            raise Failure(f"the model returns logits of shape {tuple(logits.shape)}, an attack needs {wanted}; check the model's classes")
        if asked and not logits.requires_grad:
            return logits + 0 * images.flatten(1).sum(1, keepdim=True)
        return logits.clone()


def checked(images: Tensor) -> Tensor:
    """The images as libraries want them: detached, contiguous, float32.

    Raises:
        ValueError: if an image leaves [0, 1].
    """
    images = images.detach()
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError(f"images must lie in [0, 1], not in [{float(images.min()):g}, {float(images.max()):g}]")
    with torch.inference_mode(False):  # a tensor made in inference mode cannot take part in a backward pass; a clone can
        return images.clone(memory_format=torch.contiguous_format).float()
