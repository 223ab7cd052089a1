"""Somebody's module as attacks need it: there is always a gradient, and what goes wrong in it is one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advml.errors import UserError


class Foreign(nn.Module):
    """Anyone's module behind a wall. It gets images of its own, contiguous ones unless told otherwise; its logits come back on the
    images' device, in their type.

    Where it is not differentiable, or its backward pass raises an error, the gradient is zero: attacks fail instead of breaking off,
    and diagnostics say why.

    Attributes:
        module: maps images (N, C, H, W) to logits (N, K).
        name: for errors.
        memory_format: of the images that it gets.
        gradient_error: why a gradient could not be computed, in its own words; None if every one could.
    Raises:
        UserError: when called, if the module raises an error.
    """

    def __init__(self, module: nn.Module, name: str = "the model", *, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.module, self.name, self.memory_format = module, name, memory_format
        self.gradient_error: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return _Walled.apply(images, self) if images.requires_grad and torch.is_grad_enabled() else self._logits(images)

    def connected(self, images: Tensor) -> Tensor:
        """Logits (N, K) with whatever history they have; without any where the module cannot keep one, as if it calls numpy()."""
        try:
            with torch.enable_grad():
                return self._called(images)
        except (torch.OutOfMemoryError, UserError):  # the first says nothing about the model
            raise
        except Exception as error:
            self.gradient_error = _first_line(error)
            with torch.no_grad():
                return self._logits(images.detach())

    def _logits(self, images: Tensor) -> Tensor:
        try:
            return self._called(images)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # somebody's code may fail in any way; it is no failure of ours
            raise failed(self.name, images, error) from None

    def _called(self, images: Tensor) -> Tensor:
        logits = self.module(images.clone(memory_format=self.memory_format))
        if not isinstance(logits, Tensor):  # perhaps with gradients only, as models with auxiliary heads
            raise UserError(f"{self.name} gives {type(logits).__name__} for {len(images)} images; attacks need a tensor of logits")
        return logits.to(images)


class _Walled(torch.autograd.Function):
    """A foreign module, whose history stays inside: whoever asks for the gradient gets one."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, foreign: Foreign) -> Tensor:
        ctx.foreign, ctx.images = foreign, images.detach().requires_grad_()
        ctx.logits = foreign.connected(ctx.images)
        return ctx.logits.detach().clone()  # clone: what was made in inference mode takes part in no backward pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        gradient = None
        try:
            if ctx.logits.requires_grad:  # retain: the graph goes with the logits, and until then is anyone's to ask twice
                (gradient,) = torch.autograd.grad(ctx.logits, ctx.images, slope, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            ctx.foreign.gradient_error = _first_line(error)
        return torch.zeros_like(ctx.images) if gradient is None else gradient, None


def failed(name: str, images: Tensor, error: Exception) -> UserError:
    """One line for an error that a module has raised on images (N, C, H, W)."""
    return UserError(f"{name} fails on a batch of {'x'.join(map(str, images.shape))} images: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
