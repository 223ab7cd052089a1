"""Loader that MLflow calls for a classifier in its registry: finds weights by path and sha256, without pickle.

>>> model = mlflow.pyfunc.load_model("models:/advml@best")
>>> logits = model.predict(images)     # (N, K) of a float array (N, C, H, W) in [0, 1]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from advml.core.errors import UserError
from advml.core.io import read_json
from advml.models.network import Network, is_whole, load_classifier, read_record


class Classifier:
    """Classifier with the interface that `mlflow.pyfunc` wraps."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Logits (N, K) of float images (N, C, H, W) in [0, 1], given as an array or as MLflow's {"images": array}."""
        array = np.asarray(images["images"] if isinstance(images, dict) else images, dtype=np.float32)
        with torch.inference_mode():
            return self.network(torch.from_numpy(array)).numpy()


def _load_pyfunc(path: str) -> Classifier:
    """Load the classifier of a weights.json (`path`, `root`, `sha256`): of an export from its own folder, else from the study that has
    logged it, or from that path below the working directory.

    Raises:
        UserError: none of these places has weights with this sha256.
    """
    weights = read_json(Path(path), needs=("path", "root", "sha256"), remedy="rebuild the run with: advml sync")
    for folder in (Path(path).parent, Path(weights["root"], weights["path"]), Path.cwd() / weights["path"]):
        if is_whole(folder) and read_record(folder)["digest"] == weights["sha256"]:
            return Classifier(load_classifier(folder).eval())
    told = f"no {weights['path']} with weights of sha256 {weights['sha256'][:16]} in {weights['root']} or here"
    raise UserError(f"{told}; in a checkout of the commit named in the model's run, fetch them with: dvc pull {weights['path']}")
