"""Map the weights of a published checkpoint to an encoder; tensors that are missing or without a use are refused by name.

    tensors = read_checkpoint(Path("model.pth"))                    # the only place that opens a pickle, with weights_only=True
    converted = convert(tensors, encoder.state_dict(), width=512, channels=3)
    encoder.load_state_dict(converted.encoder)

| layout                        | names                                                        |
|-------------------------------|--------------------------------------------------------------|
| torchvision, timm             | conv1, bn1, layer1..4, downsample.0, downsample.1, fc        |
| ResNets of CIFAR, SupContrast | shortcut.0, shortcut.1, linear                               |
| RobustSSL                     | bn1.bn_list.0 (clean), .1 (adversarial), downsample.conv, .bn |
| DataParallel, solo-learn, ... | any prefix: module., backbone., encoder.module.              |
| MadryLab/robustness           | module.model., again as module.attacker.model., normalizer   |
| RobustBench                   | buffers mu and sigma, mean and std, normalize.mean, ...      |
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from advml.core.errors import UserError
from advml.models.normalization import POSSIBLE, Constants
from advml.models.weights import PICKLES, endings, listed, prefix_of, read

NESTED = ("state_dict", "model_state_dict", "model", "net", "simclr_state")  # keys under which files keep their weights
# Pattern of a name -> name in timm; applied unless the encoder itself has the original name.
RENAMED = (
    (r"\bshortcut\.", "downsample."),
    (r"\bdownsample\.conv\.", "downsample.0."),
    (r"\bdownsample\.bn\.", "downsample.1."),
    (r"\.bn_list\.0\.", ".clean."),
    (r"\.bn_list\.1\.", ".adversarial."),
)
BRANCH = re.compile(r"\.(clean|adversarial)\.(?=\w+$)")  # branches of a batch norm, by the names of `DualBatchNorm`
# Parts that may precede a head's name
WRAPPERS = ("module", "model", "backbone", "encoder", "encoder_q", "base_encoder", "attacker", "net")
CLASSIFIERS = ("fc", "linear", "classifier", "head", "head.fc")
HEADS = (*CLASSIFIERS, "projection_head", "proj_head", "projector", "linear_projector", "predictor", "prototypes", "projection")
CONSTANT = re.compile(r"(?:^|\.)(?:normali\w+\.)?(?:new_)?(?:(?P<mean>mu|mean)|(?P<std>sigma|std))$")


@dataclass(frozen=True, eq=False)
class Converted:
    """A checkpoint converted to the names of an encoder.

    Attributes:
        encoder: state dict of the encoder; counters of batches may be missing.
        classifier: `weight` (K, D) and `bias` (K,) of the single linear head; empty: no head matches the encoder.
        constants: of the normalisation in the checkpoint's buffers; None: there is none.
        prefix: of the encoder's names in the file.
        classifier_name: name of the classifier in the file.
        left_out: names in the file that are not used: other heads, copies, the clean branch of batch norms, and those of `without`.
    """

    encoder: dict[str, Tensor]
    classifier: dict[str, Tensor]
    constants: Constants | None
    prefix: str
    classifier_name: str
    left_out: tuple[str, ...]


class Unaccounted(ValueError):
    """A checkpoint does not fit an encoder; `count`: number of mismatches, used to find the closest architecture."""

    def __init__(self, reason: str, count: int) -> None:
        super().__init__(reason)
        self.count = count


# Reading


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors file, or of a torch.save file with `weights_only=True`.

    Raises:
        UserError: the file cannot be read, contains other objects than weights, or no named tensors.
    """
    content: Any = safetensors.torch.load(read(path)) if not _is_pickle(path) else _unpickled(path)
    while isinstance(content, Mapping) and (inner := next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)):
        content = inner
    if not isinstance(content, Mapping):
        raise UserError(f"{path} contains a {type(content).__name__}, not named weights; save model.state_dict() instead")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(content):
        other = next((str(name) for name in content if name not in tensors), "nothing at all")
        raise UserError(f"{path} has {other} among its weights, which is not a tensor; put the weights under one of {', '.join(NESTED)}")
    return tensors


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2)[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or path.suffix.lower() in PICKLES
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _unpickled(path: Path) -> Any:
    """Unpickle tensors, numbers and containers only, and argparse.Namespace, in which training scripts keep their options."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle raise various errors
        refused = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)|class ([\w.]+)", str(error))
        reason = f"it contains {next(filter(None, refused.groups()))}" if refused else type(error).__name__
        raise UserError(
            f"{path} does not contain weights only ({reason}), and other objects are not unpickled; if you trust it, save its state dict: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from None


# Mapping


def convert(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, width: int, channels: int, without: Sequence[str] = ()
) -> Converted:
    """Find each weight of an encoder in a checkpoint, and a use for each tensor of the checkpoint.

    The prefix is the text that most names have before an encoder's name. From two-branch batch norms, an encoder with single ones gets
    the adversarial branch, which inference uses; single ones are copied to both branches.

    Args:
        tensors: by the checkpoint's names.
        wanted: the encoder's state dict.
        width: D of its features.
        channels: of its images.
        without: patterns of names to leave out, e.g. "momentum_*".
    Raises:
        Unaccounted: a tensor has no use, or a weight is missing or has another shape; names the first three of each, with the most similar
            name on the other side.
    """
    left_out = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in without)]
    names = {raw: _renamed(raw, wanted) for raw in tensors if raw not in left_out}
    two, asked = two_branches(names.values()), two_branches(wanted)
    if two and not asked:
        left_out += [raw for raw, name in names.items() if ".clean." in name and BRANCH.search(name)]
        names = {raw: BRANCH.sub(".", name) for raw, name in names.items() if raw not in left_out}
    single = {BRANCH.sub(".", name): value for name, value in wanted.items()} if asked and not two else wanted

    prefix, taken, rest = prefix_of(names.values(), single), {}, {}
    for raw, name in names.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else None
        if inner in single and inner not in taken:
            taken[inner] = raw
        else:
            rest[raw] = name
    copies = [raw for raw, name in rest.items() if any(_equal(tensors, raw, taken.get(ending)) for ending in endings(name))]
    constants, buffers = _constants({raw: name for raw, name in rest.items() if raw not in copies}, tensors, channels)
    heads, again = _heads({raw: name for raw, name in rest.items() if raw not in (*copies, *buffers)}, tensors)
    copies += again
    named, classifier = _classifier(heads, tensors, width)
    left_out += [*copies, *(raw for inner, raw in heads.items() if not named or not inner.startswith(f"{named}."))]

    stray = [name.removeprefix(prefix) for raw, name in rest.items() if raw not in (*copies, *buffers, *heads.values())]
    missing = [name for name in single if name not in taken and not name.endswith("num_batches_tracked")]
    shapes = [
        f"{raw} {tuple(tensors[raw].shape)} for {tuple(single[name].shape)}"
        for name, raw in taken.items()
        if tensors[raw].shape != single[name].shape
    ]
    in_file = {name.removeprefix(prefix): raw for raw, name in names.items()}
    _check(stray, missing, shapes, file=in_file, encoder=single)
    found = {name: tensors[taken[short]] for name in wanted if (short := name if single is wanted else BRANCH.sub(".", name)) in taken}
    return Converted(found, classifier, constants, prefix, named, tuple(left_out))


def two_branches(names: Iterable[str]) -> bool:
    """Whether names belong to two-branch batch norms, in the checkpoint's naming or that of `DualBatchNorm`."""
    return any(BRANCH.search(_renamed(name, ())) for name in names)


def _renamed(name: str, wanted: Iterable[str]) -> str:
    for pattern, ours in RENAMED:
        if re.search(pattern, name) and not any(re.search(pattern, other) for other in wanted):
            name = re.sub(pattern, ours, name)
    return name


def _equal(tensors: Mapping[str, Tensor], raw: str, other: str | None) -> bool:
    return other is not None and torch.equal(tensors[raw], tensors[other])


def _heads(rest: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Tensors of heads (name without wrappers -> name in the file), and names of their copies in the file."""
    found: dict[str, str] = {}
    copies = []
    for raw, name in rest.items():
        inner = _unwrapped(name)
        if (
            inner.startswith(tuple(f"{head}." for head in HEADS))
            and found.setdefault(inner, raw) != raw
            and _equal(tensors, raw, found[inner])
        ):
            copies.append(raw)
    return found, copies


def _unwrapped(name: str) -> str:
    """Remove wrappers from a name: module.head.0.weight -> head.0.weight, head.module.0.weight -> head.0.weight."""
    parts = name.split(".")
    while parts[0] in WRAPPERS:
        del parts[0]
    return ".".join(part for place, part in enumerate(parts) if place == 0 or part != "module")


def _constants(rest: Mapping[str, str], tensors: Mapping[str, Tensor], channels: int) -> tuple[Constants | None, list[str]]:
    """Normalisation in the checkpoint's buffers, and the buffers' names in the file."""
    found: dict[str, list[str]] = {"mean": [], "std": []}
    for raw, name in rest.items():
        if (match := CONSTANT.search(name)) and tensors[raw].numel() in (1, channels):
            found[match.lastgroup].append(raw)
    if not all(found.values()):
        return None, []
    values = {kind: {tuple(tensors[raw].flatten().tolist()) for raw in raws} for kind, raws in found.items()}
    raws = [raw for some in found.values() for raw in some]
    if any(len(each) > 1 for each in values.values()):
        raise Unaccounted(f"the normalisations {', '.join(raws)} differ; leave one out: --without NAME", 1)
    constants = Constants(*(next(iter(each)) for each in values.values())).of_channels(channels)
    for kind, numbers in zip(("--mean", "--std"), constants, strict=True):
        if not all(map(POSSIBLE[kind], numbers)):
            raise Unaccounted(f"the normalisation {', '.join(raws)} is {numbers}, which images in [0, 1] cannot have", 1)
    return constants, raws


def _classifier(heads: Mapping[str, str], tensors: Mapping[str, Tensor], width: int) -> tuple[str, dict[str, Tensor]]:
    """Name (without wrappers) and tensors of the linear head on the features; name "" if there is none."""
    found = {}
    for name in CLASSIFIERS:
        parts = {inner.removeprefix(f"{name}."): tensors[raw] for inner, raw in heads.items() if inner.startswith(f"{name}.")}
        weight = parts.get("weight")
        if parts.keys() <= {"weight", "bias"} and weight is not None and weight.ndim == 2 and weight.shape[1] == width:
            found[name] = {"weight": weight, "bias": parts.get("bias", weight.new_zeros(len(weight)))}
    if len(found) > 1:
        raise Unaccounted(f"{' and '.join(found)} could both be its classifier; leave one out: --without '*{list(found)[1]}.*'", 1)
    return next(iter(found.items()), ("", {}))


def _check(stray: Sequence[str], missing: Sequence[str], shapes: Sequence[str], *, file: Mapping[str, str], encoder: Iterable[str]) -> None:
    """Raise Unaccounted if any list is not empty; `file`: name without the prefix -> full name."""
    told = {
        "there is no use for": [file[name] + _nearest(name, encoder) for name in stray],
        "it lacks": [name + _nearest(name, file) for name in missing],
        "of other shapes are": shapes,
    }
    if any(told.values()):
        raise Unaccounted(listed(told), sum(map(len, told.values())))


def _nearest(name: str, others: Iterable[str]) -> str:
    close = get_close_matches(name, list(others), n=1)
    return f" (nearest: {close[0]})" if close else ""
