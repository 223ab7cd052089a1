"""`advml import FILE --backbone NAME`: convert a published checkpoint to a model's folder, without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from advml.core.errors import UserError
from advml.core.io import replace_folder, sha256
from advml.core.paths import Workspace, checked_name, is_reserved
from advml.core.provenance import git_commit
from advml.data import prepared
from advml.models import class_names, importing
from advml.models.checkpoints import Converted, read_checkpoint
from advml.models.network import Architecture, save
from advml.models.normalization import KNOWN, constants


@dataclass(frozen=True, eq=False)
class Imported:
    folder: Path
    architecture: Architecture
    remarks: tuple[str, ...]


def import_checkpoint(
    workspace: Workspace,
    file: Path,
    backbone: str,
    *,
    name: str | None = None,
    stem: str | None = None,
    image_size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    classes: str | None = None,
    without: Sequence[str] = (),
) -> Imported:
    """Write `models/imported/<NAME>/` with model.safetensors and model.json, which records the use of each tensor of the file.

    Options that are None are taken from the file, `image_size` from the prepared data.

    Raises:
        UserError: the file cannot be read, or a tensor does not fit the backbone; names the tensors.
    """
    name = checked_name(name or file.stem.replace(" ", "_"))
    if is_reserved(name):
        raise UserError(f"the name {name} is reserved for models of this study; choose another with --name")
    tensors = read_checkpoint(file)
    given = constants(mean, std, known=KNOWN, channels=3)
    size = image_size or _size_of_data(workspace)
    network, converted = importing.network_of(
        tensors, file=file, backbone=backbone, image_size=size, stem=stem, given=given, without=without
    )
    architecture = network.architecture
    names = class_names.read(classes, ()) if classes is not None else None
    if names is not None and len(names) != architecture.classes:
        raise UserError(f"--classes names {len(names)} classes, but {file} has {architecture.classes or 'no'} logits; each needs a name")
    origin = {
        "file": str(file),
        "sha256": sha256(file),
        "prefix": converted.prefix,
        "classifier": converted.classifier_name or None,
        "normalization": "of the file" if converted.constants else "given" if given else "none",
        "left_out": list(converted.left_out),
    }
    about = {"name": name, "kind": "imported", "git_commit": git_commit(workspace.root), "input": list(network.image_shape)}
    with replace_folder(workspace.imported(name)) as folder:
        save(network, folder, about | ({"classes": names} if names else {}) | {"origin": origin})
    return Imported(workspace.imported(name), architecture, tuple(_remarks(file, converted, normalized=bool(converted.constants or given))))


def _size_of_data(workspace: Workspace) -> int:
    if not workspace.prepared.is_dir():
        raise UserError(f"the image size is unknown, as {workspace.prepared} does not exist; add it, e.g. --image-size 32")
    return prepared.load(workspace.prepared).shape[1]


def _remarks(file: Path, converted: Converted, *, normalized: bool) -> list[str]:
    head = f"{converted.classifier_name} is its classifier" if converted.classifier else "no linear head on the features: an encoder only"
    found = [f"{file}: {head}"]
    if converted.left_out:
        found.append(f"{file}: left out: {', '.join(dict.fromkeys(name.rpartition('.')[0] or name for name in converted.left_out))}")
    if not normalized:
        found.append(
            f"{file} has no normalisation: images in [0, 1] are passed to it unchanged; if it was trained with one, import it again with "
            "--mean cifar10, --mean imagenet, ..."
        )
    return found
