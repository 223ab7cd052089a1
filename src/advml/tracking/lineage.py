"""Where a run's weights lie and where they came from, as MLflow shows it: models, links, a description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from advml.tracking import ui

if TYPE_CHECKING:
    from advml.tracking.store import Store

NOW = "advml.now."  # tags: values of parameters that the last measurement took otherwise than MLflow's columns say


def add_model(store: Store, run_id: str, tags: Mapping[str, str], *, folder: Path, digest: str) -> str:
    """Create the external model of a run and return its id.

    The same calls as `mlflow.create_external_model`, which works on MLflow's global state only. In place of its
    empty MLmodel file the model carries our model.json.
    """
    from mlflow.entities import LoggedModelOutput

    client = store.client
    ours = {key: value for key, value in tags.items() if key.startswith("advml.")}
    model = client.create_logged_model(
        store.experiment,
        name=tags["advml.name"],
        source_run_id=run_id,
        tags={**ours, "mlflow.model.isExternal": "true", "advml.digest": digest, "mlflow.note.content": describe(store, tags)},
        params={"path": tags["advml.path"], "sha256": digest},
        model_type=tags["advml.kind"],
    )
    if (folder / "model.json").exists():
        client.log_model_artifact(model.model_id, str(folder / "model.json"))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def add_parent(store: Store, run_id: str, parent_id: str) -> dict[str, str]:
    """Make the parent's model an input of the run and return the tags that name the parent."""
    from mlflow.entities import LoggedModelInput

    parent = store.client.get_run(parent_id)
    if model := parent.data.tags.get("advml.model_id"):
        store.client.log_inputs(run_id, models=[LoggedModelInput(model)])
    return {"advml.pretraining_run": parent_id, "advml.pretraining_name": parent.info.run_name}


def describe(store: Store, tags: Mapping[str, str]) -> str:
    """The run's description in the UI (Markdown): its pretraining, and how to load the model."""
    lines = []
    if parent := tags.get("advml.pretraining_run"):
        lines.append(f"Pretraining: [{tags['advml.pretraining_name']}]({ui.run_link(store.experiment, parent)})")
    if path := tags.get("advml.path"):
        load = f'; load it with `advml.load_model("{path}")`' if tags["advml.kind"] == "model" else ""
        lines.append(f"Weights: `{path}/model.safetensors` (`dvc pull {path}` fetches them){load}")
    now = [f"`{key.removeprefix(NOW)}` {value}" for key, value in sorted(tags.items()) if key.startswith(NOW)]
    if now:
        lines.append(f"The columns of parameters keep the first values. The last measurement took: {', '.join(now)}")
    return "\n\n".join(lines)
