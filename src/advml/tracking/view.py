"""Columns of MLflow's table of runs, saved with the experiment, because the default table shows neither metrics nor parameters.

`advml ui` links to this view. In plain `mlflow ui` it is in the menu Views of the experiment's runs.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from advml.tracking.names import FLAGS, NOTE

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "results"
VIEW = f"mlflow.sharedViewState.{KEY}"  # tag of the experiment, as set by the UI's menu
# Column -> width in pixels.
COLUMNS = {
    "attributes.`Duration`": 90,
    "metrics.`accuracy/clean`": 130,
    "metrics.`accuracy/threat_model_2`": 200,
    "metrics.`accuracy/worst_case`": 170,
    f"tags.`{FLAGS}`": 130,
    "params.`scheme`": 90,
    "params.`regime`": 100,
    "params.`seed`": 70,
    "params.`epsilon`": 90,
}
ABOUT = (
    "Models and results of [advml](https://arxiv.org/abs/2302.02502). Figures: runs, then the menu **Views**, **Results**. "
    "Report: in the run `study ...`. To compare models: tick them, then **Compare**."
)


def save(client: MlflowClient, experiment: str) -> None:
    """Save view and description with the experiment once; later changes by users are kept."""
    tags = client.get_experiment(experiment).tags
    if VIEW not in tags:
        state = {"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS, "runsHiddenMode": "SHOW_ALL"}
        state |= {"orderByKey": "metrics.`accuracy/worst_case`", "orderByAsc": False}
        now = int(time.time() * 1000)
        view = {"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
        client.set_experiment_tag(experiment, VIEW, json.dumps(view))
    if NOTE not in tags:
        client.set_experiment_tag(experiment, NOTE, ABOUT)
