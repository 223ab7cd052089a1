"""Finds out how a foreign module must be adapted to the prepared data: where its logits are, of what type, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from advml.data.class_order import natural_order
from advml.data.datasets import Dataset
from advml.errors import UserError
from advml.networks import class_names
from advml.networks.adapted import READINGS, Adapted, Adapter, reading_of
from advml.networks.foreign import failed
from advml.networks.normalization import Constants
from advml.runtime.machine import own_randomness

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
