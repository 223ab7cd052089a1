"""`advml export MODEL`: a folder that plain timm and ONNX runtimes load, checked on test images, and a registered model of MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advml import tracking
from advml.config.store import Place
from advml.core.errors import UserError
from advml.core.io import replace_folder
from advml.core.paths import Workspace, find_model
from advml.data import prepared
from advml.models import export
from advml.models.network import Network, load, read_record

CHECKED = 512  # test images, at most


@dataclass(frozen=True)
class Exported:
    folder: Path
    files: tuple[str, ...]
    lines: tuple[str, ...]  # of Python, that load it with timm
    registered: str | None  # its name in MLflow's registry: models:/advml@CL-AT-s0
    remarks: tuple[str, ...]


def export_model(workspace: Workspace, model: str, out: Path | None = None, *, place: Place | None = None) -> Exported:
    """Write the folder anew; without a classifier features are exported, and no ONNX.

    Args:
        place: the store in which the classifier is registered; None: in none.

    Raises:
        UserError: there is no such model, or timm has no such classifier.
        Failure: what was written gives other outputs than the model.
    """
    source = find_model(workspace, model)
    network = load(source).eval()
    images, remarks = _images(workspace, network)
    out = out or workspace.exported(source.name)
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if others := sorted(there - export.FILES):
        raise UserError(f"--out {out} holds {others[0]}, which is of no export and would be lost; give a new folder")
    with replace_folder(out) as folder:
        lines = export.to_timm(network, folder, images)
        if network.classifier is None:
            remarks.append(f"{source} has no classifier: timm's network gives features, and no ONNX was written")
        else:
            remarks += _onnx(network, folder, images)
        files = tuple(sorted(path.name for path in folder.iterdir()))
    if network.architecture.normalize_logits:
        remarks.append("timm's network gives logits before their normalisation to unit length: the same predictions, other confidences")
    registered = None
    if place and network.classifier is not None and read_record(source).get("kind") != "pretrain":
        registered = tracking.register_exported(place, source)
    return Exported(out, files, tuple(line.replace(str(folder), str(out)) for line in lines), registered, tuple(remarks))


def _onnx(network: Network, folder: Path, images: Tensor) -> list[str]:
    try:
        export.to_onnx(network, folder, images)
    except ImportError as error:
        return [f'no ONNX was written: {error.name} is not installed; pip install "advml[onnx]"']
    return []


def _images(workspace: Workspace, network: Network) -> tuple[Tensor, list[str]]:
    """Test images in [0, 1], or random ones where there are none of the network's shape."""
    if workspace.prepared.is_dir() and (dataset := prepared.load(workspace.prepared)).shape == network.image_shape:
        return dataset.test.images[:CHECKED].float() / 255, []
    images = torch.rand(CHECKED // 16, *network.image_shape, generator=torch.Generator().manual_seed(0))
    return images, [f"{workspace.prepared} holds no test images of this shape; the export was checked on random ones"]
