"""The optimiser of a phase, with learning rates that fall from the top of the network to the bottom if so wished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from advml import config
from advml.networks.layers import depths

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, **kwargs: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **kwargs),
}


def optimizer(phase: config.Phase, learners: Sequence[nn.Parameter], network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that `phase` names, over `learners`, each in exactly one group; `network` tells how deep they lie."""
    groups = layer_groups(learners, network.encoder, layer_decay=phase.layer_decay) if phase.layer_decay < 1 else [whole(learners)]
    return OPTIMIZERS[phase.optimizer](groups, lr=phase.learning_rate, weight_decay=phase.weight_decay)


def whole(learners: Sequence[nn.Parameter]) -> dict[str, Any]:
    """All in one group."""
    return {"params": list(learners), "share": 1.0}


def layer_groups(learners: Sequence[nn.Parameter], encoder: nn.Module, *, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters by depth, from the top: block k learns at `share` = layer_decay ** k of the rate (Bao et al. 2022, sec. 3.2).

    Heads are block 0, the encoder's last block is 1. AdamW's and SGD's weight decay is scaled with the rate, as it is part of the step.
    """
    depth = depths(encoder)
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in learners:
        groups.setdefault(depth.get(parameter, 0), []).append(parameter)
    return [{"params": groups[block], "share": layer_decay**block} for block in sorted(groups)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Every group gets its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
