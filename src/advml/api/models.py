"""Load a trained model; shared parts of the functions of `advml.api`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from advml import config
from advml.config.presets import PRESETS
from advml.config.presets import preset as preset_text
from advml.core.device import Machine
from advml.data.datasets import Dataset, Split
from advml.data.tensors import dataset_of, require
from advml.models import adapter, external, network
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


def listed(words: str | Sequence[str]) -> list[str]:
    """List of strings, from several or from one."""
    return [words] if isinstance(words, str) else list(words)


def names_of(classes: int | str | Sequence[str]) -> list[str]:
    """Names of classes: as given, or the numbers of so many."""
    return [str(one) for one in range(classes)] if isinstance(classes, int) else listed(classes)


def config_of(params: str | Path | config.Config, overrides: list[str]) -> config.Config:
    """Configuration from a params.yaml, a preset's name or a Config, with overrides applied."""
    if isinstance(params, config.Config):
        return config.changed(params, dict(map(config.parse_override, overrides)))
    if str(params) in PRESETS:
        source = f"preset {params}"
        return config.validate(config.apply(preset_text(str(params)), overrides, source=source), source=source, overrides=overrides)
    return config.load(params, overrides)


def machine_of(model: nn.Module, precision: str = "fp32") -> Machine:
    """Device of the model's weights (the CPU if it has none), with the precision, as a `Machine`.

    Raises:
        UserError: the model is not a torch module, or inference mode is on, in which there are no gradients.
    """
    require(isinstance(model, nn.Module), f"the model is of type {type(model).__name__}; wrap what it does in a torch.nn.Module")
    require(not torch.is_inference_mode_enabled(), "torch.inference_mode() permits no gradients; call this outside of it")
    return Machine(next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu")), precision)


def adapted(
    model: nn.Module,
    machine: Machine,
    test: Split,
    *,
    validation: Split | None = None,
    classes: int | str | Sequence[str] | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> tuple[external.Given, Dataset]:
    """Model with input and output adapted as by `advml evaluate`, and the images as a dataset of its classes.

    Args:
        classes: number or names of the classes; None: the number of logits.
        mean, std: of the normalisation that the model expects.
    Raises:
        UserError: the model fails on the images or returns no logits, or a label exceeds the classes.
    """
    if classes is None:
        logits = adapter.read(model, "model", test.images[:2].to(machine.device))[1]
        classes = 2 if logits.ndim < 2 or logits.shape[1] == 1 else logits.shape[1]  # a single logit means two classes
    dataset = replace(dataset_of(test, validation or test, names_of(classes)), test=test)
    return external.of_module(model, external.LoadOptions(mean=mean, std=std), dataset=dataset, device=machine.device), dataset
