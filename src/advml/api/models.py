"""Load a trained model; shared parts of the functions of `advml.api`."""

from __future__ import annotations

from collections.abc import Sequence
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

BATCH = 512  # default number of images in a forward pass


def load_model(path: str | Path) -> Network:
    """Load a trained classifier from a folder of `models/finetune/`, in eval mode, on the CPU.

    Args:
        path: the folder with `model.safetensors` and `model.json`.
    Returns:
        A module that maps float images (N, C, H, W) in [0, 1] to logits (N, K).
    Raises:
        UserError: the folder does not contain a trained classifier, or its files are damaged.

    Example:
        >>> advml.load_model("models/finetune/CL-Full-AT-s0")                                     # doctest: +SKIP
    """
    return place(network.load_classifier(path), torch.device("cpu")).eval()


def config_of(params: str | Path | config.Config, overrides: Sequence[str]) -> config.Config:
    """Configuration from a params.yaml, a preset's name or a Config, with overrides applied."""
    if isinstance(params, config.Config):
        return config.changed(params, dict(map(config.parse_override, overrides)))
    if str(params) in PRESETS:
        source = f"preset {params}"
        return config.validate(
            config.apply(preset_text(str(params)), list(overrides), source=source), source=source, overrides=list(overrides)
        )
    return config.load(params, list(overrides))


def machine_of(model: nn.Module, precision: str = "fp32") -> Machine:
    """Device of the model's weights (the CPU if it has none), with the precision, as a `Machine`."""
    return Machine(next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu")), precision)
