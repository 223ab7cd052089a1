"""Order of class names: text order, which numbers this project's labels, against natural order, which timm's trainer uses."""

from __future__ import annotations

import re
from collections.abc import Iterable


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted as a person counts: runs of digits as numbers, letters without regard to case.

        >>> natural_order(["10", "2", "1"]), sorted(["10", "2", "1"])
        (['1', '2', '10'], ['1', '10', '2'])

    The order of labels in models that timm's own trainer made from class folders (`timm.utils.misc.natural_key`); torchvision's
    ImageFolder, and this project, sort as text. Names that compare equal (`a1`, `A01`) are sorted as text among themselves.
    """
    return sorted(names, key=lambda name: (_parts(name), name))


def _parts(name: str) -> list[str | int]:
    """'img12b' -> ['img', 12, 'b']: text and numbers in turn, so that two names never compare text with a number."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]
