"""`model.init`: start a pretraining from the weights of a model's folder or a safetensors file instead of random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from advml.core.errors import UserError
from advml.core.messages import tell
from advml.core.paths import given_path
from advml.core.provenance import init_digest
from advml.models.checkpoints import Unaccounted, convert
from advml.models.network import Network, read_record
from advml.models.weights import read as read_weights


@dataclass(frozen=True, eq=False)
class StartingPoint:
    """Weights by their names in the file, the file's sha256, and the content of model.json (empty for a bare safetensors file)."""

    path: str
    digest: str  # sha256
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def read(init: str) -> StartingPoint:
    """Read the weights that `model.init` names.

    Raises:
        UserError: the folder or file does not exist, is damaged, or is a pickle.
    """
    path, digest, record = given_path(init), init_digest(init), {}
    if path.is_dir():
        record = read_record(path)
        if record.get("digest") != digest:
            raise UserError(f"model.init = {init}: model.safetensors is not the file that model.json describes; make the model again")
        path = path / "model.safetensors"
    return StartingPoint(init, digest, safetensors.torch.load(read_weights(path)), record)


def start_from(network: Network, start: StartingPoint, *, classes: Sequence[str]) -> dict[str, Any]:
    """Load the weights of a starting point into a network; returns the names of the loaded parts, for the record.

    The encoder must fit exactly. The normalisation is taken over if the file has one, the projection head if its shape matches, the
    classifier if shape and class names (in order) match.

    Raises:
        UserError: the architecture differs; names the key of `model` or the weights.
    """
    architecture, theirs = network.architecture, start.record.get("architecture", {})
    for key in ("backbone", "stem", "options"):
        if key in theirs and theirs[key] != (ours := getattr(architecture, key)):
            raise UserError(f"model.{key} = {ours!r}, but model.init = {start.path} has {theirs[key]!r}; set them alike")
    try:
        found = convert(start.tensors, network.encoder.state_dict(), width=network.width, channels=architecture.channels)
    except Unaccounted as error:
        what = f"{architecture.backbone} with model.stem = {architecture.stem}"
        raise UserError(f"model.init = {start.path} does not fit {what} ({error})") from None
    network.encoder.load_state_dict(network.encoder.state_dict() | found.encoder)
    taken = ["encoder"]
    if found.constants:
        constants = found.constants.of_channels(architecture.channels)
        network.architecture = replace(architecture, **constants._asdict())
        for name, values in constants._asdict().items():
            getattr(network.normalize, name).copy_(torch.tensor(values).view(1, -1, 1, 1))
        taken.append("normalization")
    else:
        tell(f"warning: model.init = {start.path} has no normalisation; that of the data is used; to set another, use: advml import --mean")
    heads = {"projection_head": {name: start.tensors[name] for name in found.left_out if name.startswith("projection_head.")}}
    if list(start.record.get("classes", ())) == list(classes):
        heads["classifier"] = {f"classifier.{name}": value for name, value in found.classifier.items()}
    for name, tensors in heads.items():
        head, named = getattr(network, name), {key.removeprefix(f"{name}."): value for key, value in tensors.items()}
        if head is not None and _shapes(head.state_dict()) == _shapes(named):
            head.load_state_dict(named)
            taken.append(name)
    return {"digest": start.digest, "taken": taken}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}
