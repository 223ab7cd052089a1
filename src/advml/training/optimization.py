"""Learning rates, radii of the attack, and optimisers of a phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from advml import config
from advml.models.layers import depths

# Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume.


def _cosine(progress: float) -> float:
    """1 -> 0 along half a cosine (Loshchilov & Hutter 2017, eq. 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    """1/25 -> 1 over the first 30 %, then -> 1/250,000, both along cosines (Smith & Topin 2018, torch's defaults)."""
    start, end, peak = 1 / 25, 1 / 25 / 1e4, 0.3
    if progress < peak:
        return 1 + (start - 1) * _cosine(progress / peak)
    return end + (1 - end) * _cosine((progress - peak) / (1 - peak))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "onecycle": _onecycle,
}


def learning_rate(phase: config.Phase, *, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) out of `steps`.

    A linear warm-up over `phase.warmup` of all steps comes first; the schedule runs over the rest.
    """
    warmup = round(phase.warmup * steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return phase.learning_rate * SCHEDULES[phase.schedule](progress)


def epsilon_share(phase: config.Phase, *, step: int, steps: int) -> float:
    """Share of the training radius, and of its step size, that optimiser step `step` (from 0) out of `steps` attacks with.

    It rises linearly over `phase.epsilon_warmup` of all steps and is 1 from then on.
    """
    warmup = round(phase.epsilon_warmup * steps)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


# The optimiser of a phase, with learning rates that fall from the top of the network to the bottom if so wished.

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, **kwargs: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **kwargs),
}


def optimizer(phase: config.Phase, learners: Sequence[nn.Parameter], network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that `phase` names, over `learners`, each in exactly one group; `network` tells how deep they lie."""
    groups = [{"params": list(learners), "share": 1.0}]
    if phase.layer_decay < 1:
        groups = layer_groups(learners, network.encoder, layer_decay=phase.layer_decay)
    fused = True if learners[0].is_cuda else None  # one kernel, which under fp16 also sees for itself whether to skip the step
    return OPTIMIZERS[phase.optimizer](groups, lr=phase.learning_rate, weight_decay=phase.weight_decay, fused=fused)


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
