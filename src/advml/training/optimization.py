"""Learning-rate schedule, epsilon warm-up and optimiser of a phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from advml import config
from advml.models.layers import depths

# Learning-rate schedules as pure functions of the step, so that a resumed training needs no state of them


def _cosine(progress: float) -> float:
    """Cosine schedule: 1 -> 0 (Loshchilov & Hutter 2017, eq. 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    """One-cycle schedule: 1/25 -> 1 over the first 30 %, then -> 1/250,000, along cosines (Smith & Topin 2018, torch's defaults)."""
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

    It starts with a linear warm-up over a share `phase.warmup` of all steps; the schedule covers the rest.
    """
    warmup = round(phase.warmup * steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return phase.learning_rate * SCHEDULES[phase.schedule](progress)


def epsilon_share(phase: config.Phase, *, step: int, steps: int) -> float:
    """Factor on epsilon and step size of the attack at optimiser step `step` (from 0) out of `steps`.

    It rises linearly over a share `phase.epsilon_warmup` of all steps, and is 1 afterwards.
    """
    warmup = round(phase.epsilon_warmup * steps)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


# Optimiser of a phase, optionally with learning rates that decay from the top of the network to the input

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, **kwargs: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **kwargs),
}


def optimizer(phase: config.Phase, learners: Sequence[nn.Parameter], network: nn.Module) -> torch.optim.Optimizer:
    """Optimiser of a phase over the parameters `learners`, each in one group; `network` determines their depths."""
    groups = [{"params": list(learners), "share": 1.0}]
    if phase.layer_decay < 1:
        groups = layer_groups(learners, network.encoder, layer_decay=phase.layer_decay)
    fused = True if learners[0].is_cuda else None  # one kernel, which under fp16 also decides on the device whether to skip the step
    return OPTIMIZERS[phase.optimizer](groups, lr=phase.learning_rate, weight_decay=phase.weight_decay, fused=fused)


def layer_groups(learners: Sequence[nn.Parameter], encoder: nn.Module, *, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups by depth from the top: block k has the share layer_decay ** k of the learning rate (Bao et al. 2022, sec. 3.2).

    Heads are block 0, the encoder's last block is 1. Weight decay of AdamW and SGD scales with the learning rate.
    """
    depth = depths(encoder)
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in learners:
        groups.setdefault(depth.get(parameter, 0), []).append(parameter)
    return [{"params": groups[block], "share": layer_decay**block} for block in sorted(groups)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
