"""Makes a foreign module give logits (N, K) of images in [0, 1] in the order of the data's classes, and gradients for attacks."""

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

# As attacks need it: there is always a gradient, and what goes wrong in the module is one line.


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


# Images in [0, 1] in, logits (N, K) in the data's order out.

# Name -> where the logits are in what a module returns. The first one that fits is taken.
READINGS: dict[str, Callable[[Any], Any]] = {
    "output": lambda output: output,
    "output.logits": lambda output: output.logits,
    "output['logits']": lambda output: output["logits"],
    "output['out']": lambda output: output["out"],
    "output[0]": lambda output: output[0],
}


def reading_of(output: Any) -> str | None:
    """The first of READINGS that finds a tensor; None: none does."""
    for name, read in READINGS.items():
        try:
            if isinstance(read(output), Tensor):
                return name
        except (AttributeError, KeyError, IndexError, TypeError):
            continue
    return None


@dataclass(frozen=True)
class Adapter:
    """What stands between a module and its use. Fields at their defaults change nothing.

    Attributes:
        constants: of a normalisation in front of the module.
        dtype: that the module computes in.
        reading: of READINGS.
        binary: the module gives one logit z, of the second of two classes. The logits (0, z) stand for it: their softmax is
            (1 - sigmoid(z), sigmoid(z)), and their cross-entropy is the binary one.
        positions: of the logits of the data's classes among the module's.
    """

    constants: Constants | None = None
    dtype: torch.dtype = torch.float32
    reading: str = "output"
    binary: bool = False
    positions: tuple[int, ...] | None = None

    def as_record(self) -> dict[str, Any]:
        """`dtype`, `reading` and `binary` where they change something; JSON-able."""
        found = {"dtype": str(self.dtype), "reading": self.reading, "binary": self.binary}
        return {name: value for name, value in found.items() if getattr(self, name) != getattr(Adapter, name)}

    def around(self, module: nn.Module) -> nn.Module:
        """The module, adapted; itself where nothing is to be changed."""
        return module if self == Adapter() else Adapted(module, self)


class Adapted(nn.Module):
    """`module` behind an `Adapter`: maps float images (N, C, H, W) in [0, 1] to logits (N, K)."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.module, self.adapter = module, adapter
        self.normalize = Normalize(*adapter.constants) if adapter.constants else nn.Identity()

    def output(self, images: Tensor) -> Any:
        """What the module itself returns."""
        return self.module(self.normalize(images).to(self.adapter.dtype))

    def forward(self, images: Tensor) -> Any:
        """Logits (N, K); where the module gives something else this time, that."""
        logits = READINGS[self.adapter.reading](self.output(images))
        if not isinstance(logits, Tensor):
            return logits
        if self.adapter.binary:
            logits = logits.reshape(len(images), 1)
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits if self.adapter.positions is None else logits[:, list(self.adapter.positions)]


# What must be adapted: where the logits are, of what type, in which order.

_HOOK = "def wrapped(): model = make(); model.register_forward_hook(lambda model, inputs, output: {}); return model"
WRAP = _HOOK.format("output['scores']")
REORDERED = "{}: logits were put into the order of the data's classes, by their names"
LOOKED_AT = 256  # validation images that show whether a single output is a probability


def fit(
    module: nn.Module, name: str, *, constants: Constants, names: Sequence[str] | None, dataset: Dataset, device: torch.device | str
) -> tuple[Adapter, list[str]]:
    """The adapter that makes the module give logits (N, K) of the prepared data, and a line for each thing that is not plain.

    Args:
        module: in eval mode, on the device.
        name: for the lines.
        constants: of the normalisation that it expects, a number per channel.
        names: of its logits, in their order; None: as the data have them.
    Raises:
        UserError: it fails on the images, no logits are found in what it returns, or the names are not those of the data.
    """
    tensors = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    adapter = Adapter(None if set(constants.mean) == {0.0} and set(constants.std) == {1.0} else constants)
    if len(types) == 1:
        adapter = replace(adapter, dtype=types.pop())
    output = _output(module, adapter, dataset.test.images[:2].to(device), name)
    reading = reading_of(output)
    if reading is None:
        raise UserError(f"{name} returns {type(output).__name__}, in which logits are looked for as {', '.join(READINGS)}; wrap it: {WRAP}")
    adapter, lines = replace(adapter, reading=reading), []
    if reading != "output":
        lines.append(f"{name}: logits are taken from {reading}")
    if len(dataset.classes) == 2 and READINGS[reading](output).shape in ((2,), (2, 1)):
        adapter = replace(adapter, binary=True)
        _check_logit(READINGS[reading](_output(module, adapter, _spread(dataset.validation.images).to(device), name)), name)
        lines.append(f"{name}: its one logit z is taken for that of class {(names or dataset.classes)[-1]!r}; logits are (0, z)")
    natural = natural_order(dataset.classes)
    if names is None and natural != list(dataset.classes):
        here, there = (", ".join(order[:3]) for order in (dataset.classes, natural))
        lines.append(f"{name}: classes are in the order {here}, ...; if its logits are in the order {there}, ..., say --classes natural")
    if names is not None:
        order = tuple(class_names.positions(names, dataset.classes, of="--classes", logits=_width(READINGS[reading](output), adapter)))
        if order != tuple(sorted(order)):
            adapter = replace(adapter, positions=order)
            lines.append(REORDERED.format(name))
    return adapter, lines


def _output(module: nn.Module, adapter: Adapter, images: Tensor, name: str) -> Any:
    """What the module itself returns for uint8 images."""
    images = images.float() / 255
    try:
        with torch.no_grad(), own_randomness(0, images.device):
            return Adapted(module, adapter).output(images)
    except Exception as error:  # somebody's code may fail in any way; it is no failure of ours
        raise failed(name, images, error) from None


def _width(logits: Tensor, adapter: Adapter) -> int | None:
    """Of logits (N, K) K; of another shape None, which is refused elsewhere."""
    return 2 if adapter.binary else logits.shape[1] if logits.ndim == 2 else None


def _spread(images: Tensor) -> Tensor:
    """LOOKED_AT of the images at most, from beginning to end: classes may come one after another."""
    return images[:: -(-len(images) // LOOKED_AT)]


def _check_logit(values: Tensor, name: str) -> None:
    """Raises UserError for what a sigmoid gives: taken for logits, probabilities would all mean the second class."""
    if values.min() >= 0 and values.min() < 0.5 < values.max() <= 1:
        logit = _HOOK.format("torch.logit(output, 1e-7)")
        raise UserError(
            f"{name} gives one number per image between 0 and 1, a probability: return the logit, which the sigmoid is taken of, "
            f"or wrap it: {logit}"
        )
