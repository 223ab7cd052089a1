"""Load any network for a comparison of layers, with the size and normalisation of its images; its outputs may have any form."""

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

COMMON = (224, 32)  # image sizes in pixels, tried for a network that does not state its own


@dataclass(frozen=True, eq=False)
class Viewed:
    """A network in eval mode, whose layers are compared.

    Attributes:
        shape: (C, H, W) of its input images.
        digest: sha256 of its weights.
        origin: folder, function or file that it was loaded from.
        constants: mean and std by which images are normalised before the network; None: it normalises them itself.
    """

    name: str
    network: nn.Module
    shape: tuple[int, int, int]
    digest: str
    origin: str
    constants: Constants | None = None

    def prepared(self, images: Tensor) -> Tensor:
        """Convert images (n, C, H, W) in [0, 1] to the network's input: normalised, in the dtype of its weights."""
        if self.constants is None:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in self.constants)
        return ((images - mean) / std).to(_dtype(self.network))


def _dtype(network: nn.Module) -> torch.dtype:
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)


def is_folder(target: str) -> bool:
    """Whether `target` of `view` names a model's folder, as opposed to a function or a timm network."""
    return Path(target).exists() or not {":", "="} & set(target)


def view(
    target: str, workspace: Workspace, *, shape: tuple[int, int, int] | None, mean: str | None, std: str | None, device: torch.device
) -> Viewed:
    """Load the network that `target` names onto the device.

    Args:
        target: a model that advml has trained, by name or folder; `module:function`; or a timm name with its weights,
            resnet18=FILE.safetensors.
        shape: of the study's images, for networks that do not state their input size; None: no prepared images.
        mean, std: of the normalisation that a network from a function expects, see `normalization.constants`; ignored for timm
            networks, whose published constants are used.
    Raises:
        UserError: the network does not exist, or fails on images of every size that was tried.
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
    """Load a timm network, with as many outputs and input channels as the weights in the file have."""
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
    """Image sizes to try, in pixels per side, the likeliest first: stated by the network, of the study's images, common ones."""
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
    """Set `shape` to the first of the sizes at which the network runs without error."""
    reasons = []
    for size in sizes:
        shape = (viewed.shape[0], size, size)
        try:
            with torch.no_grad(), own_randomness(0, device):
                viewed.network(viewed.prepared(torch.full((2, *shape), 0.5, device=device)))
            return replace(viewed, shape=shape)
        except Exception as error:  # third-party code may raise anything
            reasons.append(f"{'x'.join(map(str, shape))}: {' '.join(str(error).split())[:100]}")
    raise UserError(f"{viewed.name} takes no images of the sizes tried ({'; '.join(reasons)}); give it an attribute image_size")
