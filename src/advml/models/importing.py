"""Convert a published checkpoint to a `Network`: stem, channels and batch-norm branches by shape, classifier, normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advml.core.errors import UserError
from advml.models.backbones import create_encoder
from advml.models.checkpoints import Converted, Unaccounted, convert, two_branches
from advml.models.layers import dual
from advml.models.network import Architecture, Network, build
from advml.models.normalization import NONE, Constants

STEMS = ("small", "native")


def network_of(
    tensors: Mapping[str, Tensor],
    *,
    file: Path,
    backbone: str,
    image_size: int,
    stem: str | None = None,
    options: dict[str, Any] | None = None,
    given: Constants | None = None,
    without: Sequence[str] = (),
) -> tuple[Network, Converted]:
    """Build the network that a checkpoint fits, and load its weights.

    Args:
        tensors: by the checkpoint's names; `file`: their file, for errors.
        backbone: a timm name.
        image_size: side in pixels of the input images.
        stem: "small" or "native"; None: the one that fits.
        options: further keyword arguments of `timm.create_model`.
        given: the normalisation that it expects; None: that of the checkpoint's buffers, else none.
        without: patterns of names to leave out.
    Raises:
        UserError: no network has a use for every tensor and gets every weight, or both stems do.
    """
    two, found, faults = two_branches(tensors), [], []
    for architecture, encoder, width in _candidates(backbone, image_size, stem, options or {}):
        wanted = (dual(encoder) if two else encoder).state_dict()
        try:
            found.append((architecture, convert(tensors, wanted, width=width, channels=architecture.channels, without=without)))
        except Unaccounted as error:
            faults.append((error.count, f"{_described(architecture)} ({error})"))
    if not found:
        raise UserError(f"{file} does not fit {min(faults)[1]}; leave tensors out with: --without PATTERN")
    if len(found) > 1:
        raise UserError(f"{file} fits {' and '.join(_described(one) for one, _ in found)}; choose: --stem small or --stem native")
    architecture, converted = found[0]
    constants = _agreed(file, converted.constants, given).of_channels(architecture.channels)
    classes = len(converted.classifier["weight"]) if converted.classifier else None
    network = build(replace(architecture, **constants._asdict(), classes=classes, dual_batch_norm=two), seed=0)
    network.encoder.load_state_dict(network.encoder.state_dict() | converted.encoder)
    if network.classifier is not None:
        network.classifier.load_state_dict(converted.classifier)
    return network, converted


def _candidates(backbone: str, image_size: int, stem: str | None, options: dict[str, Any]) -> Iterator[tuple[Architecture, nn.Module, int]]:
    """Yield possible architectures, each with its encoder (on the meta device) and width; stems that the backbone lacks are skipped."""
    usual = {"options": options, "projection_size": None, "normalize_logits": False, "dual_batch_norm": False, "classes": None}
    refusals = []
    for one, channels in product(STEMS if stem is None else (stem,), (3, 1)):
        size = {"stem": one, "channels": channels, "image_size": image_size}
        try:
            with torch.device("meta"):
                encoder, width = create_encoder(backbone, **size, options=options)
        except UserError as error:
            refusals.append(error)
        else:
            yield Architecture(backbone=backbone, **size, **usual, **NONE._asdict()), encoder, width
    if len(refusals) == 2 * len(STEMS if stem is None else (stem,)):
        raise refusals[-1]


def _described(architecture: Architecture) -> str:
    a = architecture
    return f"{a.backbone} for {a.channels} x {a.image_size} x {a.image_size} images with stem {a.stem}"


def _agreed(file: Path, held: Constants | None, given: Constants | None) -> Constants:
    """Normalisation of the file or of the user; raises UserError if both exist and differ."""
    if held is not None and given is not None and held != given.of_channels(len(held.mean)):
        raise UserError(f"{file} contains the normalisation mean {held.mean}, std {held.std}; leave out --mean and --std")
    return held or given or NONE
