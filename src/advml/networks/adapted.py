"""A foreign module with the interface that everything here expects: images in [0, 1] in, logits (N, K) in the data's order out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advml.networks.models import Normalize
from advml.networks.normalization import Constants

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
