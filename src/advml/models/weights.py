"""Load safetensors files of other projects into a network: removes a prefix of names, and refuses mismatches by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from advml.core.errors import UserError
from advml.core.messages import first_of

SHOWN = 3  # number of names in a message
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar")


def read(path: Path) -> bytes:
    """Content of a safetensors file.

    Raises:
        UserError: the file cannot be read or has another format; for a pickle, which can run code, with the way to convert it.
    """
    try:
        content = path.read_bytes()
        safetensors.torch.load(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        if path.suffix.lower() in PICKLES or content[:2] == b"PK" or content[:1] == b"\x80":
            raise UserError(how_to_convert(path)) from None
        raise UserError(f"{path} is not a safetensors file ({error}); write one with safetensors.torch.save_file") from None
    return content


def how_to_convert(path: Path) -> str:
    """Message on how to convert a file of torch.save."""
    return f"a pickle can run code when it is opened, and is not loaded; convert it once with: advml import {path} --backbone TIMM_NAME"


def fill(network: nn.Module, content: bytes) -> str:
    """Load weights into a network; returns the prefix by which their names were longer than the network's, usually "".

    DataParallel, Lightning and others save a network as `module.fc.weight`, `model.module.fc.weight`, `state_dict.fc.weight`, ...

    Args:
        content: of a safetensors file.
    Raises:
        ValueError: names or shapes differ from the network's; names the first three of each kind.
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
    """Prefix whose removal makes most names match `wanted` (the shortest of several); "" if none does. Removes whole parts only.

    >>> prefix_of(["module.a.w", "module.b.w"], ["a.w", "b.w"])
    'module.'
    """
    wanted = set(wanted)
    found = Counter(name[: len(name) - len(rest)] for name in names for rest in endings(name) if rest in wanted)
    return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")


def endings(name: str) -> list[str]:
    """All endings of a dotted name: a.b.c -> a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Message with the first three names that are surplus, missing, or of another shape; "" if there are none."""
    counters = [name for name in wanted if name.endswith("num_batches_tracked")]  # missing in older files, and filled in by torch
    kinds = {
        "it has beyond the network": sorted(name for name in given if name not in wanted),
        "it lacks": [name for name in wanted if name not in given and name not in counters],
        "of other shapes are": [
            f"{name} {tuple(tensor.shape)} for {tuple(wanted[name].shape)}"
            for name, tensor in given.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    return listed(kinds)


def listed(kinds: Mapping[str, Sequence[str]]) -> str:
    """Message with the first names of each kind: `it lacks a, b, c and 2 more; ...`; "" if there are none."""
    return "; ".join(f"{what} {first_of(names, SHOWN)}" for what, names in kinds.items() if names)
