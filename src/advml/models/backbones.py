"""Build encoders: any timm backbone, optionally with a stem for small images.

A usual stem reduces the side of an image to a quarter before the first block, which leaves too little of 8 or 32 pixels.
`stem: small` keeps the resolution: a 3x3 convolution of stride 1 and no pooling (He et al. 2016, sec. 4.2), or small patches for
transformers. SMALL_STEMS implements it family by family; other families are refused.
`stem: native` accepts any timm network that can be built for the size of the images.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from advml.core.errors import UserError


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _resnet(model: nn.Module, channels: int) -> None:
    model.conv1 = _conv3x3(channels, model.bn1.num_features)
    model.maxpool = nn.Identity()


def _convnext(model: nn.Module, channels: int) -> None:
    model.stem[0] = _conv3x3(channels, model.stem[0].out_channels)
    for layer in model.stem[1:]:
        if isinstance(layer, nn.Conv2d):  # overlapping stems (`_ols`) have a second strided convolution
            layer.stride = (1, 1)


def _mobile(model: nn.Module, channels: int) -> None:
    model.conv_stem.stride = (1, 1)


def _regnet(model: nn.Module, channels: int) -> None:
    model.stem.conv.stride = (1, 1)


# Convolutional family -> function that replaces the stem of a model in place.
SMALL_STEMS: dict[type[nn.Module], Callable[[nn.Module, int], None]] = {
    ResNet: _resnet,
    ConvNeXt: _convnext,
    EfficientNet: _mobile,
    MobileNetV3: _mobile,
    RegNet: _regnet,
}


UNTRAINED = "encoders start from random weights"
# Options of timm.create_model that users must not set -> reason.
SET_ELSEWHERE = {
    "checkpoint_path": f"no pickle is ever loaded, and {UNTRAINED}",
    "cache_dir": UNTRAINED,
    "num_classes": "the classifier is added later, for the classes of the data",
    "in_chans": "the channels are those of the data",
    "img_size": "the size is that of the data",
    "features_only": "an encoder gives one vector per image",
    "scriptable": "the network is not scripted",
    "exportable": "the network is not exported",
    "no_jit": "the network is not scripted",
}


# Image sizes (sides in pixels) that are tried, to name those that a network accepts.
SIZES = (28, 32, 36, 48, 64, 72, 96, 120, 128, 160, 192, 224, 240, 256, 288, 384, 512)


def _patches(image_size: int) -> dict[str, Any]:
    """Arguments for an 8 x 8 grid of patches if the side allows it: patches of 4 pixels for 32, 1 pixel for 8."""
    return {"patch_size": next(size for size in range(max(1, image_size // 8), 0, -1) if image_size % size == 0)}


def create_encoder(
    backbone: str, *, stem: str, channels: int, image_size: int, options: dict[str, Any], classes: int = 0
) -> tuple[nn.Module, int]:
    """Build a timm encoder that maps normalised images (N, C, S, S) to features (N, D); random weights.

    Args:
        backbone: a name in `timm.list_models()`.
        stem: "native" (as timm builds it for images of that size) or "small" (keeps the resolution; see SMALL_STEMS).
        channels, image_size: of the input.
        options: further keyword arguments of `timm.create_model`.
        classes: number of logits of timm's own classifier, which are then returned instead of features; 0: features.
    Returns:
        The encoder and its feature size D.
    Raises:
        UserError: the name is unknown, timm does not accept the options, the family has no small stem, or the network cannot be built for
            such images; then the message names possible sizes.
    """
    _check_names(backbone, options)
    what = f"model.backbone = {backbone!r}" + (f" with model.options = {options}" if options else "")
    try:
        family = _family(backbone)
    except Exception as error:  # e.g. an unknown tag after the name
        raise UserError(f"{what} cannot be built ({_reason(error)}); choose another model.backbone") from None
    arguments = timm_arguments(backbone, stem=stem, channels=channels, image_size=image_size, options=options, classes=classes)
    try:
        encoder = timm.create_model(backbone, pretrained=False, **arguments)
        if stem == "small" and family in SMALL_STEMS:
            SMALL_STEMS[family](encoder, channels)
        elif stem == "small" and isinstance(encoder.patch_embed, HybridEmbed):
            raise UserError(f"model.stem = 'small' is not available for {backbone} with its convolutional patches; use model.stem = native")
        features = _features(encoder, torch.zeros(1, channels, image_size, image_size))
    except UserError:
        raise
    except Exception as error:  # timm's networks raise various errors
        images = f"{channels} x {image_size} x {image_size} images"
        remedy = _remedy(backbone, family, stem=stem, channels=channels, image_size=image_size, options=options)
        raise UserError(f"{what} cannot be built with model.stem = {stem} for {images} ({_reason(error)}); {remedy}") from None
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"{what} gives features of shape {shape}, not one vector per image")
    return encoder, features.shape[1]


def _check_names(backbone: str, options: dict[str, Any]) -> None:
    """Raise UserError if timm does not know the name, or an option must not be set by users."""
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=5) or ["resnet18", "convnext_atto", "vit_tiny_patch16_224"]
        raise UserError(f"model.backbone = {backbone!r} is not a timm model; did you mean {', '.join(close)}?")
    for key in options:
        if key in SET_ELSEWHERE or str(key).startswith("pretrained"):
            raise UserError(f"model.options.{key} = {options[key]!r} is refused: {SET_ELSEWHERE.get(key, UNTRAINED)}; leave it out")


@cache  # asked several times for every network, and as slow to answer as the network to build
def _family(backbone: str) -> type[nn.Module]:
    with torch.device("meta"):  # no memory, no initialisation
        return type(timm.create_model(backbone, pretrained=False))


def _small_stem(backbone: str, family: type[nn.Module], image_size: int) -> dict[str, Any]:
    """Arguments of timm's constructor for `stem: small`; convolutional families are changed afterwards instead."""
    if issubclass(family, VisionTransformer):
        return _patches(image_size)
    if family not in SMALL_STEMS:
        known = ", ".join(sorted(kind.__name__ for kind in (*SMALL_STEMS, VisionTransformer)))
        raise UserError(f"model.stem = 'small' is not available for {backbone} ({family.__name__}); use model.stem = native, or: {known}")
    return {}


def remark_on_stem(backbone: str, *, stem: str, image_size: int) -> str | None:
    """Remark on images that are small for the native stem of a network that also has a small one."""
    family = _family(backbone)
    if stem == "small" or image_size >= 64 or not (family in SMALL_STEMS or issubclass(family, VisionTransformer)):
        return None
    return f"model.stem = native suits images of 64 pixels or more, and these have {image_size}; small keeps their resolution"


def timm_arguments(
    backbone: str, *, stem: str, channels: int, image_size: int, options: dict[str, Any], classes: int = 0
) -> dict[str, Any]:
    """Arguments of `timm.create_model`; the size of the images only for families that need it (most convolutional ones do not)."""
    family = _family(backbone)
    asks = any("img_size" in inspect.signature(kind.__init__).parameters for kind in family.__mro__)
    sized = _small_stem(backbone, family, image_size) if stem == "small" else {}
    return ({"img_size": image_size} if asks else {}) | {"in_chans": channels, "num_classes": classes} | sized | options


def _features(encoder: nn.Module, images: Tensor) -> Any:
    """Features from one forward pass, so that an encoder that does not accept its images fails before training."""
    encoder.eval()
    try:
        with torch.no_grad():
            return encoder(images)
    finally:
        encoder.train()


def _reason(error: Exception) -> str:
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:200])))


def _remedy(backbone: str, family: type[nn.Module], *, stem: str, channels: int, image_size: int, options: dict[str, Any]) -> str:
    """Remedy for the error message: change the options if the network can be built without them, else the size of the images."""

    def fits(size: int) -> bool:
        """Whether the network can be built for this size, tried on the meta device, without memory and arithmetic."""
        arguments = timm_arguments(backbone, stem=stem, channels=channels, image_size=size, options={})
        try:
            with torch.device("meta"):
                encoder = timm.create_model(backbone, pretrained=False, **arguments)
                _features(encoder, torch.zeros(1, channels, size, size))
        except Exception:
            return False
        return True

    if options and fits(image_size):
        return f"it can be built without model.options; see the arguments of timm's {family.__name__}"
    nearest = sorted(set(SIZES) - {image_size}, key=lambda size: abs(size - image_size))
    sizes = sorted(islice(filter(fits, nearest), 4))
    return (f"it accepts data.image_size = {', '.join(map(str, sizes))}; or " if sizes else "") + "choose another model.backbone"
