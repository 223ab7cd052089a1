"""`model.init`: weights that a pretraining starts from, of a model's folder or a safetensors file, instead of random ones."""

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
    """Weights by the names of their file, its sha256, and model.json if they are of a model's folder."""

    path: str
    digest: str  # sha256
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def read(init: str) -> StartingPoint:
    """What `model.init` names.

    Raises:
        UserError: there is no such folder or file, it is damaged, or a pickle.
    """
    path, digest, record = given_path(init), init_digest(init), {}
    if path.is_dir():
        record = read_record(path)
        if record.get("digest") != digest:
            raise UserError(f"model.init = {init}: model.safetensors is not the file that model.json describes; make the model again")
        path = path / "model.safetensors"
    return StartingPoint(init, digest, safetensors.torch.load(read_weights(path)), record)


def start_from(network: Network, start: StartingPoint, *, classes: Sequence[str]) -> dict[str, Any]:
    """Fill the encoder, strictly; also each head of the network that the file has in its shape. Returns what was taken, for the record.

    The normalisation comes along. A classifier is taken only where the file's model tells the same classes apart, in the same order.

    Raises:
        UserError: it is of another architecture; the key of `model`, or the names of the weights, are told.
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
        tell(f"warning: model.init = {start.path} holds no normalisation; that of the data is used: advml import --mean sets another one")
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
