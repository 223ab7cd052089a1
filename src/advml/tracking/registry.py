"""MLflow's model registry: the most robust model of a study, and exported models, as versions of one registered model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from advml.core.io import read_csv, read_json
from advml.core.paths import Workspace
from advml.tracking import store as stores
from advml.tracking.parameters import STRENGTH
from advml.tracking.results import Record, phases
from advml.tracking.run import Run
from advml.tracking.store import DIGEST, FLAGS, MODEL, RESULT, TRANSFER_FLAGS

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

VERSIONS = "mlflow.modelVersions"  # tag of a logged model, shown on MLflow's page of models
BEST, SCORE = "best", "validation/adversarial_accuracy"
ABOUT = (
    f"The alias `{BEST}` is the model with the highest accuracy on validation images under the attack of training, at the epoch that was "
    "kept; test images had no part in it. Models whose phase has a radius or a number of steps of its own do not compare, and are left "
    "out. Exported models have their name as alias."
)


def register_best(store: stores.Store) -> None:
    """Set the alias BEST to the best model of the reported study, chosen as ABOUT says.

    Test images have no part in the choice, and models whose training does not measure the score (ST) are no candidates.
    """
    workspace = Workspace(store.place.root)
    table = workspace.reports / "summary.csv"
    reported = [row["model"] for row in read_csv(table)] if table.exists() else []
    scored = {name: found for name in reported if (found := _score(workspace, name))}
    if not scored:
        return
    name = max(scored, key=lambda name: scored[name][0])
    score, digest = scored[name]
    if (run := store.find(kind="model", name=name, digest=digest)) and MODEL in run.data.tags:
        scores = {SCORE: f"{score:.4f}"}
        _register(Run(store, run), alias=BEST, tags=scores, about=f" On validation under attack: {100 * score:.1f} %.")


def register_exported(place: stores.Place, folder: Path) -> str | None:
    """Register the classifier in `folder` with its weights, loadable without the study's files; its name becomes the alias.

    An existing version of the same weights is completed; a model without a run gets one.

    Returns:
        `models:/advml@CL-AT-s0`; None, after one warning line, if the store does not work.
    """

    def register() -> str:
        store = stores.connect(place)
        record = read_json(folder / "model.json", needs=("name", "kind", "digest"), remedy="restore it with: dvc checkout")
        if found := store.find(name=record["name"], digest=record["digest"]):
            run = Run(store, found)
        else:
            with Run.begin(store, record) as run:
                run.log_checkpoint(folder, digest=record["digest"])
        store.client.log_model_artifact(run.tags[MODEL], str(folder / "model.safetensors"))
        alias = re.sub(r"[^\w-]", "_", record["name"], flags=re.ASCII)
        if re.fullmatch(rf"{BEST}|latest|v\d+", alias, re.IGNORECASE):  # the last two are reserved by MLflow
            alias = f"model-{alias}"
        return f"models:/{_register(run, alias=alias).name}@{alias}"

    return stores.attempt(place, register, then="the exported model is not registered")


def _register(run: Run, *, alias: str, tags: Mapping[str, str] | None = None, about: str = "") -> ModelVersion:
    """Return the registered version of a run's model, created if missing, after setting the alias to it."""
    from mlflow.exceptions import MlflowException

    client, name = run.client, re.sub(r"[/:]", "_", run.store.place.experiment)
    try:
        client.create_registered_model(name, description=ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = next(iter(client.search_model_versions(f"name = '{name}' and run_id = '{run.id}'")), None)
    if version is None:
        logged = client.get_logged_model(run.tags[MODEL])
        told = f"{run.tags['advml.name']}. On test: {run.tags.get(RESULT, 'not measured')}.{about}"
        told_of = {key: run.tags[key] for key in (DIGEST, FLAGS, TRANSFER_FLAGS) if key in run.tags} | dict(tags or {})
        # The artifact location, because `models:/<id>` is resolved in MLflow's globally configured store.
        of = {"run_id": run.id, "model_id": logged.model_id, "tags": told_of, "description": told}
        version = client.create_model_version(name, logged.artifact_location, **of)
        versions = [*json.loads(logged.tags.get(VERSIONS, "[]")), {"name": name, "version": int(version.version)}]
        client.set_logged_model_tags(logged.model_id, {VERSIONS: json.dumps(versions)})
    if client.get_registered_model(name).aliases.get(alias) != version.version:
        client.set_registered_model_alias(name, alias, version.version)
    return version


def _score(workspace: Workspace, model: str) -> tuple[float, str] | None:
    """Score of a model and the sha256 of its weights.

    None if neither its training nor its pretraining measured the score, or if the attack was not the study's.
    """
    found = phases(workspace, workspace.model(model))
    record, history = next((phase for phase in found if phase[1]), ({}, []))  # the last phase with training epochs
    kept = next((epoch for epoch in history if epoch["epoch"] == record.get("epoch")), {})
    return (kept[SCORE], found[0][0]["digest"]) if SCORE in kept and _under_the_attack_of_the_study(record) else None


def _under_the_attack_of_the_study(record: Record) -> bool:
    parameters = record.get("parameters") or {}
    section, name = ("regimes", record.get("regime")) if record.get("kind") == "model" else ("pretrain", record.get("scheme"))
    phase = (parameters.get(section) or {}).get(name) or {}
    return all(phase.get(key) in (None, (parameters.get(of) or {}).get(own)) for key, (of, own) in STRENGTH.items())
