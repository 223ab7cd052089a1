"""A checkpoint as a model of MLflow's store: its weights stay where DVC keeps them, and are found again by path and sha256.

`mlflow.pyfunc.load_model("models:/advml@best")` loads a classifier; `predict` maps float images (N, C, H, W) in [0, 1], as an array, to
logits (N, K). What the store holds is text: MLmodel, model.json and weights.json. No pickle is written or read.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from advml.core.errors import UserError
from advml.core.io import read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

WEIGHTS = "weights.json"


def log_files(client: MlflowClient, model: LoggedModel, folder: Path, *, root: Path, path: str, digest: str) -> None:
    """Give the model its record, and a classifier what MLflow needs to load it; an encoder without one has no MLmodel file."""
    record = folder / "model.json"
    if not record.exists():
        return
    client.log_model_artifact(model.model_id, str(record))
    content = read_json(record, remedy="restore it with: dvc checkout")
    if content.get("kind") != "model" or "input" not in content:
        client.set_logged_model_tags(model.model_id, {"mlflow.model.isExternal": "true"})
        return
    with tempfile.TemporaryDirectory() as place:
        weights, description = Path(place, WEIGHTS), Path(place, "MLmodel")
        weights.write_text(json.dumps({"path": path, "root": str(root), "sha256": digest}, indent=1))
        description.write_text(_mlmodel(model, shape=content["input"], classes=len(content["classes"])))
        for file in (weights, description):
            client.log_model_artifact(model.model_id, str(file))


def _mlmodel(model: LoggedModel, *, shape: list[int], classes: int) -> str:
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs, outputs = TensorSpec(np.dtype("float32"), (-1, *shape), "images"), TensorSpec(np.dtype("float32"), (-1, classes), "logits")
    signature = ModelSignature(Schema([inputs]), Schema([outputs]))
    described = Model(run_id=model.source_run_id, signature=signature, model_id=model.model_id)
    written_by = {"python_version": platform.python_version()}
    return described.add_flavor("python_function", loader_module=__name__, data=WEIGHTS, **written_by).to_yaml()


class Classifier:
    """What `mlflow.pyfunc` calls."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Logits (N, K) of float images (N, C, H, W) in [0, 1], given as an array or as MLflow's {"images": array}."""
        import torch

        array = np.asarray(images["images"] if isinstance(images, dict) else images, dtype=np.float32)
        with torch.inference_mode():
            return self.network(torch.from_numpy(array)).numpy()


def _load_pyfunc(path: str) -> Classifier:
    """What MLflow calls with the place of weights.json: the weights in the study's folder, or in the same place below the working folder.

    Raises:
        UserError: neither holds the weights of this sha256.
    """
    from advml.models.network import is_whole, load_classifier, read_record

    weights = read_json(Path(path), needs=("path", "root", "sha256"), remedy="rebuild the run with: advml sync")
    folders = [Path(root, weights["path"]) for root in (weights["root"], Path.cwd())]
    for folder in folders:
        if is_whole(folder) and read_record(folder)["digest"] == weights["sha256"]:
            return Classifier(load_classifier(folder).eval())
    told = f"no {weights['path']} with weights of sha256 {weights['sha256'][:16]} in {weights['root']} or here"
    raise UserError(f"{told}; fetch them with: dvc pull {weights['path']}, in a checkout of the commit that the model's run names")
