"""Any network to look into: its name, the size of its images, and the normalisation that they get. Its outputs may be anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from advml.core.device import own_randomness
from advml.core.errors import UserError
from advml.core.io import sha256
from advml.core.paths import Workspace, find_model
from advml.models import weights
from advml.models.external import from_function
from advml.models.memory_format import place
from advml.models.network import load, read_record
from advml.models.normalization import KNOWN, NONE, Constants, constants, published

COMMON = (224, 32)  # pixels, tried where a network does not say what it takes


@dataclass(frozen=True, eq=False)
class Viewed:
    """A network, in eval mode.

    Attributes:
        shape: (C, H, W) of the images that it is given.
        digest: sha256 of its weights.
        origin: where it came from.
        constants: of the normalisation that its images get; None: it normalises itself.
    """

    name: str
    network: nn.Module
    shape: tuple[int, int, int]
    digest: str
    origin: str
    constants: Constants | None = None

    def prepared(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) in [0, 1], as the network takes them: normalised, in the type of its weights."""
        if self.constants is None:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in self.constants)
        return ((images - mean) / std).to(_dtype(self.network))


def _dtype(network: nn.Module) -> torch.dtype:
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)


def is_folder(target: str) -> bool:
    """Whether `target` of `view` names a model's folder, and neither a function nor weights of timm."""
    return Path(target).exists() or not {":", "="} & set(target)


def view(
    target: str, workspace: Workspace, *, shape: tuple[int, int, int] | None, mean: str | None, std: str | None, device: torch.device
) -> Viewed:
    """The network that `target` names, on the device.

    Args:
        target: a model that advml has trained, by name or folder; `module:function`; or a timm name with its weights,
            resnet18=FILE.safetensors.
        shape: of the study's images, for networks that do not say what they take; None: there are none.
        mean, std: of the normalisation that networks of functions expect, see `normalization.constants`; a timm network knows its own.
    Raises:
        UserError: there is no such network, or it fails on images of every size that was tried.
    """
    if is_folder(target):
        folder = find_model(workspace, target)
        record, network = read_record(folder), load(folder)
        return Viewed(folder.absolute().name, place(network, device), network.image_shape, record["digest"], str(folder))
    if "=" in target:
        found, (mean, std) = _timm(*target.split("=", 1)), (None, None)
    else:
        given = from_function(target)
        found = Viewed(given.name, given.network, (0, 0, 0), given.digest, target, NONE)
    network = found.network.to(device).eval()
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), shape[0] if shape else 3)
    usual = found.constants if mean is None and std is None else constants(mean, std, known=KNOWN, channels=channels)
    found = replace(found, network=network, shape=(channels, 0, 0), constants=usual.of_channels(channels))
    return _sized(found, _sizes(network, shape), device)


def _timm(name: str, file: str) -> Viewed:
    """With as many outputs and input channels as the weights have."""
    if not timm.is_model(name):
        raise UserError(f"there is no timm model {name!r}, as in {name}={file}")
    path = Path(file)
    content = weights.read(path)
    stored, plain = safetensors.torch.load(content), timm.create_model(name, pretrained=False)
    prefix = weights.prefix_of(stored, plain.state_dict())
    wanted = {}
    for key, option, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = plain.default_cfg.get(key)
        tensor = stored.get(f"{prefix}{layer}.weight") if isinstance(layer, str) else None
        wanted[option] = tensor.shape[axis] if tensor is not None and tensor.ndim > axis else 0 if option == "num_classes" else 3
    network = timm.create_model(name, pretrained=False, **wanted)
    try:
        weights.fill(network, content)
    except ValueError as error:
        raise UserError(f"{path} does not fit timm's {name} ({error})") from None
    return Viewed(f"{name}-{path.stem}", network, (0, 0, 0), sha256(content), f"{name}={file}", published(network))


def _sizes(network: nn.Module, shape: tuple[int, int, int] | None) -> Sequence[int]:
    """Pixels per side that the network may take, the likeliest first: its own word, the study's images, common sizes."""
    config = getattr(network, "config", None)  # of Hugging Face
    said = (
        getattr(network, "image_size", None),  # of torchvision's transformers
        (getattr(network, "default_cfg", None) or {}).get("input_size", (0, None))[-1],  # of timm
        getattr(config, "image_size", None),
        shape[-1] if shape else None,
        *COMMON,
    )
    return list(dict.fromkeys(size for size in said if isinstance(size, int)))


def _sized(viewed: Viewed, sizes: Sequence[int], device: torch.device) -> Viewed:
    """With the first size at which the network gives something."""
    reasons = []
    for size in sizes:
        shape = (viewed.shape[0], size, size)
        try:
            with torch.no_grad(), own_randomness(0, device):
                viewed.network(viewed.prepared(torch.full((2, *shape), 0.5, device=device)))
            return replace(viewed, shape=shape)
        except Exception as error:  # somebody's code may fail in any way
            reasons.append(f"{'x'.join(map(str, shape))}: {' '.join(str(error).split())[:100]}")
    raise UserError(f"{viewed.name} takes no images of the sizes tried ({'; '.join(reasons)}); give it an attribute image_size")
