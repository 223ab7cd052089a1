"""`advml export MODEL`: write a folder for timm and ONNX runtimes, compared with the model on test images; register it in MLflow."""

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

CHECKED = 512  # largest number of test images for the comparison


@dataclass(frozen=True)
class Exported:
    folder: Path
    files: tuple[str, ...]
    lines: tuple[str, ...]  # Python code that loads it with timm
    registered: str | None  # its name in MLflow's registry: models:/advml@CL-AT-s0
    remarks: tuple[str, ...]


def export_model(workspace: Workspace, model: str, out: Path | None = None, *, place: Place | None = None) -> Exported:
    """Write the folder, replacing an earlier export; a model without classifier is exported as features, without ONNX.

    Args:
        place: the store in which the classifier is registered; None: in none.

    Raises:
        UserError: the model does not exist, or timm's network of this family has another kind of classifier.
        Failure: the exported model gives other outputs than the model.
    """
    source = find_model(workspace, model)
    network = load(source).eval()
    images, remarks = _images(workspace, network)
    out = out or workspace.exported(source.name)
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if others := sorted(there - export.FILES):
        raise UserError(f"--out {out} contains {others[0]}, which does not belong to an export and would be lost; give a new folder")
    with replace_folder(out) as folder:
        lines = export.to_timm(network, folder, images)
        if network.classifier is None:
            remarks.append(f"{source} has no classifier: timm's network returns features, and no ONNX was written")
        else:
            try:
                export.to_onnx(network, folder, images)
            except ImportError as error:
                remarks.append(f'no ONNX was written: {error.name} is not installed; pip install "advml[onnx]"')
        files = tuple(sorted(path.name for path in folder.iterdir()))
    if network.architecture.normalize_logits:
        remarks.append("timm's network returns logits before their normalisation to unit length: same predictions, other confidences")
    registered = None
    if place and network.classifier is not None and read_record(source).get("kind") != "pretrain":
        registered = tracking.register_exported(place, source)
    return Exported(out, files, tuple(line.replace(str(folder), str(out)) for line in lines), registered, tuple(remarks))


def _images(workspace: Workspace, network: Network) -> tuple[Tensor, list[str]]:
    """Test images in [0, 1], or random ones if the prepared data have another shape; with notes for the user."""
    if workspace.prepared.is_dir() and (dataset := prepared.load(workspace.prepared)).shape == network.image_shape:
        return dataset.test.images[:CHECKED].float() / 255, []
    images = torch.rand(CHECKED // 16, *network.image_shape, generator=torch.Generator().manual_seed(0))
    return images, [f"{workspace.prepared} has no test images of this shape; the export was checked on random images"]
