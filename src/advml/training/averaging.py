"""Weight averages over training, which are validated, selected and saved instead of the latest weights.

| average | weights                                            | batch-norm statistics                     | source                 |
|---------|----------------------------------------------------|-------------------------------------------|------------------------|
| ema     | a <- decay a + (1 - decay) w after every step      | averaged likewise                         | momentum copy, DynACL  |
| swa     | mean of the weights at the ends of the last        | re-estimated: plain means over one pass   | Izmailov et al. 2018   |
|         | 1 - `average_start` of all epochs                  | of training batches, clean and attacked,  |                        |
|         |                                                    | through the averaged weights              |                        |

Training continues from the weights w, not from the average. Both averages are part of the resume state.
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
    """Base class, and the case without an average: the latest weights are validated and kept."""

    def __init__(self, network: nn.Module, phase: config.Phase, *, epochs: int) -> None:
        self.network, self.phase = network, phase
        self.first = 1  # first epoch that can be validated
        self.needs_statistics = False  # whether batch-norm statistics must be re-estimated before the average is validated
        self.values: State = {}

    @property
    def state(self) -> State:
        """Tensors that a resumed training restores."""
        return {f"average/{key}": value for key, value in self.values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, own in self.network.state_dict().items():
            if f"average/{name}" in state:
                self.values[name] = state[f"average/{name}"].to(own.device)

    def after_step(self) -> None:
        """Update the average after an optimiser step."""

    def after_epoch(self, epoch: int) -> None:
        """Update the average after the last step of an epoch (counted from 1)."""

    @torch.no_grad()
    def _move(self, share: float) -> None:
        """a <- a + share (w - a); integers (counts of batches) are copied from w."""
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.values[key].lerp_(value, share)
            else:
                self.values[key].copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: the network has the averaged weights inside, its own again afterwards."""
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
    """Exponential moving average: a <- decay a + (1 - decay) w after every step, from the initial weights."""

    def __init__(self, network: nn.Module, phase: config.Phase, *, epochs: int) -> None:
        super().__init__(network, phase, epochs=epochs)
        self.values = snapshot(network)

    def after_step(self) -> None:
        self._move(1 - self.phase.average_decay)


class StochasticAverage(Average):
    """Mean of the weights at the ends of epochs (SWA)."""

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
    """Context manager that re-estimates batch-norm statistics as plain means over the batches inside it.

    Yields the number of batch norms that are re-estimated: those in train mode that track statistics.
    """
    layers = {layer: layer.momentum for layer in batch_norms(network) if layer.training and layer.track_running_stats}
    for layer in layers:
        layer.momentum = None
        layer.num_batches_tracked.zero_()  # old statistics stay until the first batch replaces them: its attack may need them
    try:
        yield len(layers)
    finally:
        for layer, momentum in layers.items():
            layer.momentum = momentum
