"""Normalisation constants of published models, and their notation on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn

from advml.core.errors import UserError


class Constants(NamedTuple):
    """Normalisation that a model expects: (x - mean) / std per channel, for images x in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of_channels(self, channels: int) -> Constants:
        """Constants with one number per channel; for images that are not RGB, the mean of published RGB constants."""
        return Constants(*(values if len(values) == channels else (sum(values) / len(values),) * channels for values in self))


NONE = Constants((0.0,), (1.0,))
KNOWN: dict[str, Constants] = {
    "none": NONE,  # [0, 1]
    "imagenet": Constants(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "half": Constants((0.5,), (0.5,)),  # [-1, 1]
    "clip": Constants(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "cifar10": Constants((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Constants((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": Constants((0.1307,), (0.3081,)),
    "levels": Constants((0.0,), (1 / 255,)),  # grey levels, 0 to 255
}


def published(network: nn.Module) -> Constants:
    """Constants published for a timm network's pretrained weights; those of ImageNet if timm has none."""
    return Constants(*(tuple(network.default_cfg.get(key) or usual) for key, usual in KNOWN["imagenet"]._asdict().items()))


def constants(mean: str | None, std: str | None, *, known: Mapping[str, Constants], channels: int) -> Constants | None:
    """Constants from `--mean` and `--std`, with a number per channel; None if neither is given.

    Each option is a name among `known`, one number, or one per channel ("0.485, 0.456, 0.406"). A name sets both constants if the other
    option is not given.

    Raises:
        UserError: a name is unknown, the number of values is wrong, a value is impossible for images in [0, 1], or only one constant is
            given as numbers.
    """
    if mean is None and std is None:
        return None
    texts = {"--mean": std if mean is None else mean, "--std": mean if std is None else std}
    if None in (mean, std) and texts["--mean"] not in known:
        has, lacks = ("--mean", "--std") if std is None else ("--std", "--mean")
        raise UserError(f"{has} {texts[has]} needs {lacks} as well, or a name that sets both: {', '.join(known)}")
    return Constants(*(_values(option, texts[option], known=known, channels=channels) for option in texts))


# Option -> whether a constant is possible for images in [0, 1].
POSSIBLE = {"--mean": lambda value: 0 <= value <= 1, "--std": lambda value: 0 < value <= 1}


def _values(option: str, text: str, *, known: Mapping[str, Constants], channels: int) -> tuple[float, ...]:
    if text in known:
        return known[text].of_channels(channels)[option == "--std"]
    try:
        values = tuple(float(part) for part in re.split(r"[,;\s]+", text.strip(" ,;()[]")))
    except ValueError:
        close = get_close_matches(text, known, n=1)
        meant = f"did you mean {close[0]}? C" if close else "c"
        raise UserError(f"{option} {text!r} is neither a number nor a known name; {meant}hoose from {', '.join(known)}") from None
    if len(values) not in (1, channels):
        raise UserError(
            f"{option} {text!r} has {len(values)} numbers, but images have {channels} channels; give one number, or one per channel"
        )
    if not all(map(POSSIBLE[option], values)):
        raise UserError(f"{option} {text!r} is impossible for images in [0, 1]; divide constants for grey levels from 0 to 255 by 255")
    return values * (channels // len(values))
