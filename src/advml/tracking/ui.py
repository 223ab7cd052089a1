"""MLflow's UI: links into it, and the table of results it opens with."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

MODE = "workflowType=machine_learning"  # else the UI opens in its mode for language models
VIEW = "results"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# By itself the table shows neither metrics nor tags. Column -> width in pixels.
COLUMNS = {
    "attributes.`Duration`": 90,
    "metrics.`accuracy/clean`": 150,
    "metrics.`accuracy/threat_model_1`": 220,
    "metrics.`accuracy/threat_model_2`": 220,
    "metrics.`accuracy/worst_case`": 190,
    "metrics.`diagnostics/flags`": 150,
    "tags.`advml.scheme`": 120,
    "tags.`advml.regime`": 120,
}


def experiment_link(base: str, experiment: str) -> str:
    """The experiment's runs as a table with accuracies, scheme and regime."""
    return f"{base}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}&{MODE}"


def run_link(experiment: str, run: str) -> str:
    """One run, relative to the UI it is shown in."""
    return f"#/experiments/{experiment}/runs/{run}?{MODE}"


def ensure_view(client: MlflowClient, experiment: Experiment) -> None:
    """Save the view "Results" with the experiment, as the UI's own menu "Views" would; the user's changes to it stay."""
    if VIEW_TAG not in experiment.tags:
        state = {"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS, "runsHiddenMode": "SHOW_ALL"}
        now = int(time.time() * 1000)
        view = {"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
        client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, json.dumps(view))
