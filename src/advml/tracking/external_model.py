"""Checkpoints as logged models of MLflow: weights stay where DVC keeps them, and are found by path and sha256.

What the store holds is text: model.json, and of a classifier the MLmodel file and weights.json, by which `models.pyfunc` loads it.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from advml.core.io import read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

LOADER, WEIGHTS = "advml.models.pyfunc", "weights.json"


def log_files(client: MlflowClient, model: LoggedModel, folder: Path, *, root: Path, path: str, digest: str) -> None:
    """Log model.json as an artifact of the model; for a classifier also the MLmodel file by which MLflow loads it."""
    record = folder / "model.json"
    if not record.exists():
        return
    client.log_model_artifact(model.model_id, str(record))
    content = read_json(record, remedy="restore it with: dvc checkout")
    classes = content.get("architecture", {}).get("classes")
    if content.get("kind") == "pretrain" or "input" not in content or not classes:
        client.set_logged_model_tags(model.model_id, {"mlflow.model.isExternal": "true"})
        return
    with tempfile.TemporaryDirectory() as place:
        Path(place, WEIGHTS).write_text(json.dumps({"path": path, "root": str(root), "sha256": digest}, indent=1))
        Path(place, "MLmodel").write_text(_mlmodel(model, shape=content["input"], classes=classes))
        client.log_model_artifacts(model.model_id, place)


def _mlmodel(model: LoggedModel, *, shape: list[int], classes: int) -> str:
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs, outputs = TensorSpec(np.dtype("float32"), (-1, *shape), "images"), TensorSpec(np.dtype("float32"), (-1, classes), "logits")
    signature = ModelSignature(Schema([inputs]), Schema([outputs]))
    described = Model(run_id=model.source_run_id, signature=signature, model_id=model.model_id)
    written_by = {"python_version": platform.python_version()}
    return described.add_flavor("python_function", loader_module=LOADER, data=WEIGHTS, **written_by).to_yaml()
