"""Adapt a third-party module: logits (N, K) of images in [0, 1] in the order of the data's classes, with gradients for attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from advml.core.device import own_randomness
from advml.core.errors import UserError
from advml.data.datasets import Dataset
from advml.data.folder_layout import natural_order
from advml.models import class_names
from advml.models.network import Normalize
from advml.models.normalization import Constants

# Wrapper for attacks: gradients always exist, and errors of the module have one line


class Foreign(nn.Module):
    """Wrapper that isolates a third-party module.

    The module gets a copy of the images; its logits are returned on the images' device, in their dtype. If it is not differentiable, or
    its backward pass raises an error, the gradient is zero: attacks then fail without an error, and diagnostics report the reason.

    Attributes:
        module: maps images (N, C, H, W) to logits (N, K).
        name: for error messages.
        memory_format: of the images that the module gets.
        gradient_error: message of the first error in computing a gradient; None if there was none.
        disconnected: whether a gradient with respect to the images was asked for and does not exist.
    Raises:
        UserError: when called, if the module raises an error.
    """

    def __init__(self, module: nn.Module, name: str = "the model", *, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.module, self.name, self.memory_format = module, name, memory_format
        self.gradient_error: str | None = None
        self.disconnected = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return _Walled.apply(images, self) if images.requires_grad and torch.is_grad_enabled() else self._logits(images)

    def connected(self, images: Tensor) -> Tensor:
        """Logits (N, K) with their autograd graph; without one if the module cannot provide it, e.g. because it calls numpy()."""
        try:
            with torch.enable_grad():
                return self._called(images)
        except (torch.OutOfMemoryError, UserError):  # out of memory is not an error of the model
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
        except Exception as error:  # third-party code may raise anything
            raise failed(self.name, images, error) from None

    def _called(self, images: Tensor) -> Tensor:
        logits = self.module(images.clone(memory_format=self.memory_format))
        if not isinstance(logits, Tensor):  # some models with auxiliary heads return tuples only when gradients are enabled
            raise UserError(f"{self.name} gives {type(logits).__name__} for {len(images)} images; attacks need a tensor of logits")
        return logits.to(images)


class _Walled(torch.autograd.Function):
    """Autograd function around a third-party module, which always provides a gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, foreign: Foreign) -> Tensor:
        ctx.foreign, ctx.images = foreign, images.detach().requires_grad_()
        ctx.logits = foreign.connected(ctx.images)
        return ctx.logits.detach().clone()  # clone, because tensors of inference mode cannot be part of a backward pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        gradient = None
        try:
            if ctx.logits.requires_grad:  # retain, because gradients may be requested twice; the graph is freed with the logits
                (gradient,) = torch.autograd.grad(ctx.logits, ctx.images, slope, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            ctx.foreign.gradient_error = _first_line(error)
        ctx.foreign.disconnected |= gradient is None
        return torch.zeros_like(ctx.images) if gradient is None else gradient, None


def failed(name: str, images: Tensor, error: Exception) -> UserError:
    """Error of one line for an exception that a module has raised on images (N, C, H, W)."""
    return UserError(f"{name} fails on a batch of {'x'.join(map(str, images.shape))} images: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# Adapter from images in [0, 1] to logits (N, K) in the data's order

# Name -> function that finds the logits in a module's output. The first that returns a tensor is used.
READINGS: dict[str, Callable[[Any], Any]] = {
    "output": lambda output: output,
    "output.logits": lambda output: output.logits,
    "output['logits']": lambda output: output["logits"],
    "output['out']": lambda output: output["out"],
    "output[0]": lambda output: output[0],
}


def reading_of(output: Any) -> str | None:
    """Name of the first of READINGS that finds a tensor; None: none does."""
    for name, read in READINGS.items():
        try:
            if isinstance(read(output), Tensor):
                return name
        except (AttributeError, KeyError, IndexError, TypeError):
            continue
    return None


@dataclass(frozen=True)
class Adapter:
    """Adaptation of a module's input and output. Fields at their defaults change nothing.

    Attributes:
        constants: of a normalisation in front of the module.
        dtype: in which the module computes.
        reading: a key of READINGS.
        binary: the module returns a single logit z, for the second of two classes. It is converted to the logits (0, z), whose softmax
            is (1 - sigmoid(z), sigmoid(z)), and whose cross-entropy is the binary one.
        positions: position of each data class among the module's logits.
    """

    constants: Constants | None = None
    dtype: torch.dtype = torch.float32
    reading: str = "output"
    binary: bool = False
    positions: tuple[int, ...] | None = None

    def as_record(self) -> dict[str, Any]:
        """Record for JSON: those of `dtype`, `reading` and `binary` that change something."""
        found = {"dtype": str(self.dtype), "reading": self.reading, "binary": self.binary}
        return {name: value for name, value in found.items() if getattr(self, name) != getattr(Adapter, name)}

    def around(self, module: nn.Module) -> nn.Module:
        """Adapted module; the module itself if nothing needs to be changed."""
        return module if self == Adapter() else Adapted(module, self)


class Adapted(nn.Module):
    """`module` with an `Adapter`: maps float images (N, C, H, W) in [0, 1] to logits (N, K)."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.module, self.adapter = module, adapter
        self.normalize = Normalize(*adapter.constants) if adapter.constants else nn.Identity()

    def output(self, images: Tensor) -> Any:
        """Output of the module itself."""
        return self.module(self.normalize(images).to(self.adapter.dtype))

    def forward(self, images: Tensor) -> Any:
        """Logits (N, K); the module's output unchanged if no logits are found in it."""
        logits = READINGS[self.adapter.reading](self.output(images))
        if not isinstance(logits, Tensor):
            return logits
        if self.adapter.binary:
            logits = logits.reshape(len(images), 1)
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits if self.adapter.positions is None else logits[:, list(self.adapter.positions)]


# Finding the adapter of a module: position, dtype and order of the logits

_HOOK = "def wrapped(): model = make(); model.register_forward_hook(lambda model, inputs, output: {}); return model"
WRAP = _HOOK.format("output['scores']")
REORDERED = "{}: logits were reordered to the data's classes by their names"
LOOKED_AT = 256  # validation images used to detect whether a single output is a probability


def fit(
    module: nn.Module, name: str, *, constants: Constants, names: Sequence[str] | None, dataset: Dataset, device: torch.device | str
) -> tuple[Adapter, list[str]]:
    """Find the adapter with which a module returns logits (N, K) for the prepared data, and notes for the user on each adaptation.

    Args:
        module: in eval mode, on the device.
        name: of the model, for the notes.
        constants: of the normalisation that it expects, per channel.
        names: class names of its logits, in order; None: the data's order.
    Raises:
        UserError: the module fails on the images, its output contains no logits, or the names are not those of the data.
    """
    plain = set(constants.mean) == {0.0} and set(constants.std) == {1.0}
    adapter, logits = read(module, name, dataset.test.images[:2].to(device), constants=None if plain else constants)
    reading, lines = adapter.reading, []
    if reading != "output":
        lines.append(f"{name}: logits are taken from {reading}")
    if len(dataset.classes) == 2 and logits.shape in ((2,), (2, 1)):
        adapter = replace(adapter, binary=True)
        _check_logit(READINGS[reading](_output(module, adapter, _spread(dataset.validation.images).to(device), name)), name)
        lines.append(f"{name}: its single logit z is used for class {(names or dataset.classes)[-1]!r}; logits are (0, z)")
    natural = natural_order(dataset.classes)
    if names is None and natural != list(dataset.classes):
        here, there = (", ".join(order[:3]) for order in (dataset.classes, natural))
        lines.append(f"{name}: classes are in the order {here}, ...; if its logits are in the order {there}, ..., add --classes natural")
    if names is not None:
        order = tuple(class_names.positions(names, dataset.classes, of="--classes", logits=_width(logits, adapter)))
        if order != tuple(sorted(order)):
            adapter = replace(adapter, positions=order)
            lines.append(REORDERED.format(name))
    return adapter, lines


def read(module: nn.Module, name: str, images: Tensor, *, constants: Constants | None = None) -> tuple[Adapter, Tensor]:
    """Adapter with the dtype of a module and the position of its logits, and its logits of the images.

    Raises:
        UserError: the module fails on the images, or its output contains no logits.
    """
    types = {value.dtype for value in module.state_dict().values() if isinstance(value, Tensor) and value.is_floating_point()}
    adapter = Adapter(constants, types.pop() if len(types) == 1 else torch.float32)
    output = _output(module, adapter, images, name)
    reading = reading_of(output)
    if reading is None:
        raise UserError(f"{name} returns {type(output).__name__}, in which logits are looked for as {', '.join(READINGS)}; wrap it: {WRAP}")
    return replace(adapter, reading=reading), READINGS[reading](output)


def _output(module: nn.Module, adapter: Adapter, images: Tensor, name: str) -> Any:
    """Output of the module itself for images, uint8 or float in [0, 1]."""
    images = images if images.is_floating_point() else images.float() / 255
    try:
        with torch.no_grad(), own_randomness(0, images.device):
            return Adapted(module, adapter).output(images)
    except Exception as error:  # third-party code may raise anything
        raise failed(name, images, error) from None


def _width(logits: Tensor, adapter: Adapter) -> int | None:
    """K of logits (N, K); None for another shape, which is refused elsewhere."""
    return 2 if adapter.binary else logits.shape[1] if logits.ndim == 2 else None


def _spread(images: Tensor) -> Tensor:
    """At most LOOKED_AT images, spread over the whole split, since images may be sorted by class."""
    return images[:: -(-len(images) // LOOKED_AT)]


def _check_logit(values: Tensor, name: str) -> None:
    """Raise UserError if the single output is a probability; read as a logit, it would always mean the second class."""
    if values.min() >= 0 and values.min() < 0.5 < values.max() <= 1:
        logit = _HOOK.format("torch.logit(output, 1e-7)")
        raise UserError(
            f"{name} gives one number per image between 0 and 1, a probability: return the logit, before the sigmoid, or wrap it: {logit}"
        )
