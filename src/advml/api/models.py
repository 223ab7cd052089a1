"""Load a model, and compute with any module without leaving a trace on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from advml import config
from advml.config.presets import PRESETS
from advml.config.presets import preset as preset_text
from advml.core.device import Machine
from advml.models import network
from advml.models.memory_format import place
from advml.models.network import Network

BATCH = 512  # images of a forward pass, where nothing else says how many


def load_model(path: str | Path) -> Network:
    """The trained classifier stored in a folder of `models/finetune/`, in eval mode, on the CPU.

    Args:
        path: the folder that holds `model.safetensors` and `model.json`.
    Returns:
        A module that maps float images (N, C, H, W) in [0, 1] to logits (N, K).
    Raises:
        UserError: the folder is no trained classifier, or its files are damaged.

    Example:
        >>> advml.load_model("models/finetune/CL-Full-AT-s0")                                     # doctest: +SKIP
    """
    return place(network.load_classifier(path), torch.device("cpu")).eval()


def config_of(params: str | Path | config.Config, overrides: Sequence[str]) -> config.Config:
    """The settings of a params.yaml, of a preset, or of a configuration, with overrides applied."""
    if isinstance(params, config.Config):
        return config.changed(params, dict(map(config.parse_override, overrides)))
    if str(params) in PRESETS:
        source = f"preset {params}"
        return config.validate(
            config.apply(preset_text(str(params)), list(overrides), source=source), source=source, overrides=list(overrides)
        )
    return config.load(params, list(overrides))


def machine_of(model: nn.Module, precision: str = "fp32") -> Machine:
    """Where the model's weights are; a model without weights computes on the CPU."""
    return Machine(next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu")), precision)


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Within: the model is in eval mode. After: each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
