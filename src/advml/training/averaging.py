"""Averages of the weights along the path of training, which are validated, selected and saved in place of the last ones.

| average | weights                                            | batch-norm statistics                     | source                 |
|---------|----------------------------------------------------|-------------------------------------------|------------------------|
| ema     | a <- decay a + (1 - decay) w after every step      | averaged likewise                         | momentum copy, DynACL  |
| swa     | mean over the ends of all epochs from the first    | re-estimated: plain means over one pass   | Izmailov et al. 2018   |
|         | that counts, of which there are the last           | of training batches, clean and attacked,  |                        |
|         | 1 - `average_start` of all                         | through the averaged weights              |                        |

Training itself goes on from its own weights. Both averages are part of the resume state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from advml import config
from advml.models.layers import batch_norms
from advml.training.checkpoint import State, snapshot


class Average:
    """No average: the weights themselves are validated and kept. The base of the others."""

    def __init__(self, network: nn.Module, phase: config.Phase, *, epochs: int) -> None:
        self.network, self.phase = network, phase
        self.first = 1  # epoch of which there is something to validate
        self.needs_statistics = False  # whether batch norms must see batches before the average is validated
        self.values: State = {}

    @property
    def state(self) -> State:
        """What a resumed training needs of it."""
        return {f"average/{key}": value for key, value in self.values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, own in self.network.state_dict().items():
            if f"average/{name}" in state:
                self.values[name] = state[f"average/{name}"].to(own.device)

    def after_step(self) -> None:
        """An optimiser step is done."""

    def after_epoch(self, epoch: int) -> None:
        """All steps of an epoch (from 1) are done."""

    @torch.no_grad()
    def _move(self, share: float) -> None:
        """a <- a + share (w - a); whole numbers (counts of batches) are taken over."""
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.values[key].lerp_(value, share)
            else:
                self.values[key].copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the network has the averaged weights. After: its own."""
        if not self.values:
            yield
            return
        own = snapshot(self.network)
        self.network.load_state_dict(self.values)
        try:
            yield
        finally:
            self.network.load_state_dict(own)


class ExponentialAverage(Average):
    """a <- decay a + (1 - decay) w after every step, from the weights before the first one."""

    def __init__(self, network: nn.Module, phase: config.Phase, *, epochs: int) -> None:
        super().__init__(network, phase, epochs=epochs)
        self.values = snapshot(network)

    def after_step(self) -> None:
        self._move(1 - self.phase.average_decay)


class StochasticAverage(Average):
    """The mean of the weights at the ends of epochs."""

    def __init__(self, network: nn.Module, phase: config.Phase, *, epochs: int) -> None:
        super().__init__(network, phase, epochs=epochs)
        self.first, self.needs_statistics = 1 + math.floor(phase.average_start * epochs), True

    def after_epoch(self, epoch: int) -> None:
        if epoch == self.first:
            self.values = snapshot(self.network)
        elif epoch > self.first:
            self._move(1 / (epoch - self.first + 1))


AVERAGES: dict[str, type[Average]] = {"none": Average, "ema": ExponentialAverage, "swa": StochasticAverage}


@contextlib.contextmanager
def fresh_statistics(network: nn.Module) -> Iterator[int]:
    """Within: batch norms in train mode, so many, take the plain mean over the batches that they see, whatever they had seen before."""
    layers = {layer: layer.momentum for layer in batch_norms(network) if layer.training and layer.track_running_stats}
    for layer in layers:
        layer.momentum = None
        layer.num_batches_tracked.zero_()  # the first batch replaces the old statistics, by which it may still be attacked
    try:
        yield len(layers)
    finally:
        for layer, momentum in layers.items():
            layer.momentum = momentum
