"""Anyone's model, for `advml evaluate`: a folder of ours, a timm name with a safetensors file, or a Python function."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from advml import config
from advml.data.datasets import Dataset
from advml.errors import UserError
from advml.networks.backbones import create_encoder
from advml.networks.foreign import Foreign
from advml.networks.models import Normalize, load_classifier, read_record
from advml.runtime.machine import own_randomness

Normalization = Literal["timm", "data", "none"]


@dataclass(frozen=True, eq=False)
class Given:
    """A model that somebody brought along.

    Attributes:
        name: for files and runs.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K), in eval mode.
        digest: sha256 of its weights.
        origin: where it came from, for the record.
        scheme: of ours; None: unknown.
        data: digest of the data it was trained on; None: unknown.
    """

    name: str
    network: nn.Module
    digest: str
    origin: dict[str, Any]
    scheme: str | None = None
    data: str | None = None


def load(target: str, *, weights: Path | None, normalization: Normalization, spec: config.Model, dataset: Dataset) -> Given:
    """The model that `target` names.

    Args:
        target: a folder with model.json; a timm name, with `weights`; or `module:function`, importable from here, whose call without
            arguments returns a torch module.
        weights: a safetensors file with timm's own names, classifier included.
        normalization: what the timm model expects: "timm" its published mean and std, "data" those of the training images, "none".
        spec: `stem` and `options` of the timm model.
    Raises:
        UserError: there is no such model, or it does not map the prepared images to a logit per class.
    """
    if (Path(target) / "model.json").is_file():
        given = _ours(Path(target))
    elif re.fullmatch(r"[\w.]+:\w+", target):
        given = _python(target)
    elif timm.is_model(target) and weights is not None:
        given = _timm(target, weights, normalization, spec, dataset)
    else:
        missing = "; its weights are missing: add --weights FILE.safetensors" if timm.is_model(target) else ""
        raise UserError(
            f"there is no model {target!r}{missing or '; give a folder with model.json, module:function, or a timm name with --weights'}"
        )
    given.network.eval()
    return replace(given, origin=given.origin | {"behaviour": _behaviour(given, dataset)})


def _ours(folder: Path) -> Given:
    record = read_record(folder)
    network = load_classifier(folder)
    data = record.get("data", {}).get("digest")
    return Given(Path(os.path.abspath(folder)).name, network, record["digest"], {"folder": str(folder)}, record.get("scheme"), data)


def _timm(name: str, weights: Path, normalization: Normalization, spec: config.Model, dataset: Dataset) -> Given:
    channels, size, _ = dataset.shape
    classes = len(dataset.classes)
    network, _ = create_encoder(name, stem=spec.stem, channels=channels, image_size=size, options=spec.options, classes=classes)
    try:
        content = weights.read_bytes()
        network.load_state_dict(safetensors.torch.load(content), strict=True)
    except OSError as error:
        raise UserError(f"{weights} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"{weights} is no safetensors file ({error}); write one with safetensors.torch.save_file") from None
    except RuntimeError as error:
        hint = "" if spec.stem == "native" else "; a network as timm makes it has its own stem: -S model.stem=native"
        reason = " ".join(str(error).split())[:160]
        what = f"{name} with {classes} classes, {channels} channels and stem {spec.stem}"
        raise UserError(f"{weights} does not fit {what}{hint} ({reason} ...)") from None
    constants = {
        "timm": lambda: (network.default_cfg["mean"], network.default_cfg["std"]),
        "data": lambda: (dataset.mean, dataset.std),
        "none": lambda: ((0.0,) * channels, (1.0,) * channels),
    }
    mean, std = (_of_channels(values, channels) for values in constants[normalization]())
    origin = {"timm": name, "weights": str(weights), "mean": list(mean), "std": list(std), "stem": spec.stem}
    whole = Foreign(nn.Sequential(Normalize(mean, std), network), name)
    return Given(f"{name}-{weights.stem}", whole, hashlib.sha256(content).hexdigest(), origin | {"options": spec.options})


def _of_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Published constants are of RGB; grey images take their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _python(target: str) -> Given:
    module, _, function = target.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), function)
        network = make()
    except (Exception, SystemExit) as error:  # somebody's code may fail in any way; it is no failure of ours
        where = f" (it may lie in {here})" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{target} gives no model: {type(error).__name__}: {' '.join(str(error).split())}{where}") from None
    finally:
        sys.path.remove(here)
    if not isinstance(network, nn.Module):
        raise UserError(f"{target} returns {type(network).__name__}; it must return a torch module that maps images in [0, 1] to logits")
    if any(isinstance(value, UninitializedTensorMixin) for value in network.state_dict().values()):
        raise UserError(f"{target} returns a model with uninitialised parameters; call it on some images before it is returned")
    return Given(target.replace(":", "-").replace(".", "-"), Foreign(network, target), _digest(network), {"function": target})


def _digest(network: nn.Module) -> str:
    """sha256 of the names and bytes of all tensors."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())  # a module's extra state may be anything
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Also of a single number, such as a batch norm's count of batches."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _behaviour(given: Given, dataset: Dataset) -> str:
    """A digest of the logits of two images: the same weights under other code are another model.

    Raises:
        UserError: the model does not take the images, or gives no logit per class.
    """
    images = dataset.test.images[:2].float() / 255
    try:
        with torch.no_grad(), own_randomness(0, images.device):
            logits = given.network(images)
    except UserError:  # of somebody's code: it says so itself
        raise
    except Exception as error:
        raise UserError(
            f"{given.name} does not take {'x'.join(map(str, dataset.shape))} images: {' '.join(str(error).split())[:300]}"
        ) from None
    found, wanted = tuple(logits.shape), (len(images), len(dataset.classes))
    if found != wanted:
        raise UserError(f"{given.name} gives {found} for {len(images)} images; the prepared data need {wanted}: a logit per class")
    if not logits.isfinite().any():
        raise UserError(f"{given.name} gives nothing but NaN or infinities for the first test images: there is nothing to measure")
    return hashlib.sha256(_bytes(logits.float())).hexdigest()[:16]
