"""Weights that others have saved, under the names of a network: read, stripped of a prefix, or refused by name. Only safetensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from advml.core.errors import UserError

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar")


def read(path: Path) -> bytes:
    """The content of a safetensors file.

    Raises:
        UserError: it cannot be read, or is of another format; of a pickle, which runs code when it is loaded, with the way to convert it.
    """
    try:
        content = path.read_bytes()
        safetensors.torch.load(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        if path.suffix.lower() in PICKLES or content[:2] == b"PK" or content[:1] == b"\x80":
            raise UserError(how_to_convert(path)) from None
        raise UserError(f"{path} is no safetensors file ({error}); write one with safetensors.torch.save_file") from None
    return content


def how_to_convert(path: Path) -> str:
    """One line on what to do with a file of torch.save."""
    return f"a pickle can run code when it is opened and is not loaded here; convert it once: advml import {path} --backbone TIMM_NAME"


def fill(network: nn.Module, content: bytes) -> str:
    """Load weights into a network; returns the prefix that their names had beyond the network's, mostly "".

    DataParallel, Lightning and others save a network as `module.fc.weight`, `model.module.fc.weight`, `state_dict.fc.weight`, ...

    Args:
        content: of a safetensors file.
    Raises:
        ValueError: names or shapes are not the network's; the message names the first three of each kind.
    """
    given, wanted = safetensors.torch.load(content), network.state_dict()
    prefix = prefix_of(given, wanted)
    named = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    wrong = _differences(named, wanted) or ("names occur with and without it" if len(named) < len(given) else "")
    if wrong:
        raise ValueError(f"without the prefix {prefix!r} of its names: {wrong}" if prefix else wrong)
    network.load_state_dict(named, strict=True)
    return prefix


def prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """The beginning without which most names are wanted, the shortest of several; "" if none ever is. Only whole parts are cut off.

    >>> prefix_of(["module.a.w", "module.b.w"], ["a.w", "b.w"])
    'module.'
    """
    wanted = set(wanted)
    found = Counter(name[: len(name) - len(rest)] for name in names for rest in endings(name) if rest in wanted)
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")


def endings(name: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c"""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The first three names that are too many, missing, or of another shape; "" if there are none."""
    counters = [name for name in wanted if name.endswith("num_batches_tracked")]  # older files lack them, and torch fills them in
    kinds = {
        "it has beyond the network": sorted(name for name in given if name not in wanted),
        "it lacks": [name for name in wanted if name not in given and name not in counters],
        "of other shapes are": [
            f"{name} {tuple(tensor.shape)} for {tuple(wanted[name].shape)}"
            for name, tensor in given.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    return "; ".join(
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" for what, names in kinds.items() if names
    )
