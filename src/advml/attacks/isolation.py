"""Restore random-number state, modes and gradients around attack libraries, and wrap models in the form they expect."""

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
    """Pairs (read, write) of functions for the state of every global random-number generator in use."""
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
    """Context manager: freeze `model` in eval mode and seed the global generators; restore everything afterwards, also after an error.

    Needed because attack libraries draw from the global generators, and call `backward()`, which would reach the parameters.

    Args:
        model: its `requires_grad` and training flags and its parameters' gradients are restored.
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
        if not torch.cuda.is_initialized():  # if CUDA starts later, it uses the last seed requested, which is then the caller's
            torch.cuda.manual_seed_all(torch.initial_seed())


def copied(model: nn.Module) -> nn.Module:
    """Deep copy of the model; the model itself if it cannot be copied."""
    try:
        with torch.no_grad():  # otherwise copies of TorchScript parameters are part of a graph
            return copy.deepcopy(model)
    except Exception:  # third-party modules may hold objects that cannot be copied: non-leaf tensors, operating-system handles
        return model


@contextmanager
def frozen_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager that yields a frozen copy of the model in eval mode; a model that cannot be copied is used itself, then restored."""
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
    """Wrap a model for attack libraries: float32 logits (N, K) for any batch, always differentiable with respect to the images.

    Libraries work on contiguous float32 images; the model gets the dtype and memory format of `like`. They modify logits in place, so
    logits are copied. They pass empty batches, which do not reach the model. If the output does not depend on the images, the gradient
    is zero; entries of a gradient that are not finite are set to zero.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        like: images in the dtype and memory format that the model expects.
        classes: K; None: not checked.
    Raises:
        Failure: when called, if the output is not (N, K).
    """

    def __init__(self, model: nn.Module, *, like: Tensor, classes: int | None = None) -> None:
        super().__init__()
        self.model, self.classes, self.dtype = model, classes, like.dtype
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.training = model.training  # the flag of this wrapper alone

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
    """Images in the form that libraries expect: detached, contiguous, float32.

    Raises:
        ValueError: an image leaves [0, 1].
    """
    images = images.detach()
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError(f"images must lie in [0, 1], not in [{float(images.min()):g}, {float(images.max()):g}]")
    with torch.inference_mode(False):  # a tensor made in inference mode cannot take part in a backward pass; a clone can
        return images.clone(memory_format=torch.contiguous_format).float()
