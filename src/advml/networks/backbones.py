"""Encoders: any timm backbone, with a stem that small images survive.

A stock stem shrinks an image fourfold before the first block, which leaves nothing of 8 or 32 pixels.
`stem: small` keeps the resolution: a 3x3 convolution of stride 1 and no pooling (He et al. 2016, sec. 4.2),
or small patches for transformers. SMALL_STEMS says how, family by family; anything else is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
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
from torch import nn

from advml.errors import UserError


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
        if isinstance(layer, nn.Conv2d):  # an overlapping stem (`_ols`) has a second strided convolution
            layer.stride = (1, 1)


def _mobile(model: nn.Module, channels: int) -> None:
    model.conv_stem.stride = (1, 1)


def _regnet(model: nn.Module, channels: int) -> None:
    model.stem.conv.stride = (1, 1)


# Family -> surgery on the finished model (convolutional families).
SMALL_STEMS: dict[type[nn.Module], Callable[[nn.Module, int], None]] = {
    ResNet: _resnet,
    ConvNeXt: _convnext,
    EfficientNet: _mobile,
    MobileNetV3: _mobile,
    RegNet: _regnet,
}


UNTRAINED = "encoders start from random weights"
# Options of timm.create_model that are not the user's to set -> why.
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


def _patches(image_size: int) -> dict[str, Any]:
    """An 8 x 8 grid of patches where the side allows it: 4 pixels for 32, 1 pixel for 8."""
    return {"patch_size": next(size for size in range(max(1, image_size // 8), 0, -1) if image_size % size == 0)}


def create_encoder(
    backbone: str, *, stem: str, channels: int, image_size: int, options: dict[str, Any], classes: int = 0
) -> tuple[nn.Module, int]:
    """Build a timm encoder that maps normalised images (N, C, S, S) to features (N, D); random weights.

    Args:
        backbone: a name that `timm.list_models()` knows.
        stem: "native" (as timm builds it) or "small" (resolution-keeping; see SMALL_STEMS).
        channels, image_size: of the input.
        options: further keyword arguments of `timm.create_model`.
        classes: 0, or how many logits timm's own classifier gives instead of features.
    Returns:
        The encoder and its feature size D.
    Raises:
        UserError: unknown name, a family without a small stem, or a network that such images do not survive.
    """
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=5) or ["resnet18", "convnext_atto", "vit_tiny_patch16_224"]
        raise UserError(f"model.backbone = {backbone!r} is no timm model; did you mean {', '.join(close)}?")
    for key in options:
        if key in SET_ELSEWHERE or key.startswith("pretrained"):
            raise UserError(f"model.options.{key} = {options[key]!r} is refused: {SET_ELSEWHERE.get(key, UNTRAINED)}; leave it out")
    arguments: dict[str, Any] = {"in_chans": channels, "num_classes": classes, **options}
    family = _family(backbone)
    if issubclass(family, VisionTransformer):
        arguments = {"img_size": image_size, **(_patches(image_size) if stem == "small" else {}), **arguments}
    elif stem == "small" and family not in SMALL_STEMS:
        known = ", ".join(sorted(kind.__name__ for kind in (*SMALL_STEMS, VisionTransformer)))
        raise UserError(f"model.stem = 'small' is not known for {backbone} ({family.__name__}); use model.stem = native, or one of {known}")
    try:
        encoder = timm.create_model(backbone, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.backbone = {backbone!r} cannot be built with {arguments}: {' '.join(str(error).split())}") from None
    if stem == "small" and isinstance(getattr(encoder, "patch_embed", None), HybridEmbed):
        raise UserError(f"model.stem = 'small' is not known for {backbone}, whose patches a network cuts; use model.stem = native")
    if stem == "small" and family in SMALL_STEMS:
        SMALL_STEMS[family](encoder, channels)
    return encoder, _width(encoder, backbone, stem=stem, channels=channels, image_size=image_size)


def _family(backbone: str) -> type[nn.Module]:
    with torch.device("meta"):  # no memory, no initialisation
        return type(timm.create_model(backbone, pretrained=False))


def _width(encoder: nn.Module, backbone: str, *, stem: str, channels: int, image_size: int) -> int:
    """One forward pass of zeros: an encoder that does not survive its images should say so before training."""
    encoder.eval()
    try:
        with torch.no_grad():
            features = encoder(torch.zeros(1, channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.backbone = {backbone!r} with model.stem = {stem} cannot take {channels} x {image_size} x {image_size} images: {reason}"
        ) from None
    finally:
        encoder.train()
    if features.ndim != 2:
        raise UserError(f"model.backbone = {backbone!r} gives features of shape {tuple(features.shape)}, not one vector per image")
    return features.shape[1]
