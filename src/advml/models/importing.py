"""A published checkpoint as a network of ours: its stem, channels and branches found by shape, its head, its normalisation."""

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
    """Build the one network that a checkpoint fits, and fill it.

    Args:
        tensors: by the checkpoint's names; `file`, where they are from, for errors.
        backbone: a timm name.
        image_size: in pixels, of the images that it will get.
        stem: "small" or "native"; None: the one that fits.
        options: further keyword arguments of `timm.create_model`.
        given: the normalisation that it expects; None: what its buffers hold, else none.
        without: patterns of names to leave out.
    Raises:
        UserError: no such network has a use for every tensor and finds every weight, or both stems do.
    """
    two, found, faults = two_branches(tensors), [], []
    for architecture, encoder, width in _candidates(backbone, image_size, stem, options or {}):
        wanted = (dual(encoder) if two else encoder).state_dict()
        try:
            found.append((architecture, convert(tensors, wanted, width=width, channels=architecture.channels, without=without)))
        except Unaccounted as error:
            faults.append((error.count, f"{_described(architecture)} ({error})"))
    if not found:
        raise UserError(f"{file} does not fit {min(faults)[1]}; name what is to be left out: --without PATTERN")
    if len(found) > 1:
        raise UserError(f"{file} fits {' and '.join(_described(one) for one, _ in found)} alike; say which: --stem small or --stem native")
    architecture, converted = found[0]
    constants = _agreed(file, converted.constants, given).of_channels(architecture.channels)
    classes = len(converted.classifier["weight"]) if converted.classifier else None
    network = build(replace(architecture, **constants._asdict(), classes=classes, dual_batch_norm=two), seed=0)
    network.encoder.load_state_dict(network.encoder.state_dict() | converted.encoder)
    if network.classifier is not None:
        network.classifier.load_state_dict(converted.classifier)
    return network, converted


def _candidates(backbone: str, image_size: int, stem: str | None, options: dict[str, Any]) -> Iterator[tuple[Architecture, nn.Module, int]]:
    """What the checkpoint could be of, with encoder (without memory) and width; stems that this backbone does not have are passed over."""
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
    """The normalisation of the file and the one that is asked for must be the same where there are both."""
    if held is not None and given is not None and held != given.of_channels(len(held.mean)):
        raise UserError(f"{file} holds the normalisation mean {held.mean}, std {held.std}; leave --mean and --std out")
    return held or given or NONE
