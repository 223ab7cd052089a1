"""The most robust model of a study, in MLflow's registry under the name of the experiment, with the alias `best`.

Test images have no part in the choice: it is the model whose kept epoch had the highest accuracy on attacked validation images, see
RULE. So models whose training does not measure it (ST) are no candidates.
"""

from __future__ import annotations

import json
import re

from advml.core.io import read_csv
from advml.core.paths import Workspace
from advml.tracking import store as stores
from advml.tracking.names import DIGEST, FLAGS, MODEL, RESULT, TRANSFER_FLAGS
from advml.tracking.parameters import OF_THE_ATTACK
from advml.tracking.results import phases
from advml.tracking.run import Record

VERSIONS = "mlflow.modelVersions"  # tag of a logged model: MLflow's page of models shows them
ALIAS, SCORE = "best", "validation/adversarial_accuracy"
RULE = (
    "Chosen by its accuracy on validation images under the attack of training, at the epoch that was kept; test images had no part in it. "
    "Models whose phase has a radius or a number of steps of its own do not compare, and are left out."
)


def register_best(store: stores.Store) -> None:
    """Let the alias point at the best model of the study that has been reported here; does nothing where it does so already."""
    from mlflow.exceptions import MlflowException

    workspace = Workspace(store.place.root)
    scored = {name: found for name in _reported(workspace) if (found := _score(workspace, name))}
    if not scored:
        return
    model = max(scored, key=lambda name: scored[name][0])
    score, digest = scored[model]
    run, client = store.find(kind="model", name=model, digest=digest), store.client
    if run is None or MODEL not in run.data.tags:
        return
    name = re.sub(r"[/:]", "_", store.place.experiment)
    try:
        client.create_registered_model(name, description=RULE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [version for version in client.search_model_versions(f"name = '{name}'") if version.run_id == run.info.run_id]
    if not known:
        logged = client.get_logged_model(run.data.tags[MODEL])
        tags = {key: run.data.tags[key] for key in (DIGEST, FLAGS, TRANSFER_FLAGS) if key in run.data.tags} | {SCORE: f"{score:.4f}"}
        about = f"{model}. On test: {run.data.tags.get(RESULT, 'not measured')}. On validation under attack: {100 * score:.1f} %."
        of = {"run_id": run.info.run_id, "model_id": logged.model_id, "tags": tags, "description": about}
        # Its place, not `models:/<id>`, which MLflow looks up in the store that is set globally.
        known = [client.create_model_version(name, logged.artifact_location, **of)]
        versions = [*json.loads(logged.tags.get(VERSIONS, "[]")), {"name": name, "version": int(known[0].version)}]
        client.set_logged_model_tags(logged.model_id, {VERSIONS: json.dumps(versions)})
    if client.get_registered_model(name).aliases.get(ALIAS) != known[0].version:
        client.set_registered_model_alias(name, ALIAS, known[0].version)


def _reported(workspace: Workspace) -> list[str]:
    """The models of the result table."""
    table = workspace.reports / "summary.csv"
    return [row["model"] for row in read_csv(table)] if table.exists() else []


def _score(workspace: Workspace, model: str) -> tuple[float, str] | None:
    """The score of a model and the sha256 of its weights.

    None where its training, or the pretraining behind it, has not measured it, or under another attack than that of the study.
    """
    found = phases(workspace, workspace.model(model))
    for record, history in found:
        if history:  # the last phase that has learned anything
            kept = next((epoch for epoch in history if epoch["epoch"] == record.get("epoch")), {})
            return (kept[SCORE], found[0][0]["digest"]) if SCORE in kept and _under_the_attack_of_the_study(record) else None
    return None


def _under_the_attack_of_the_study(record: Record) -> bool:
    parameters = record.get("parameters") or {}
    section, name = ("regimes", record.get("regime")) if record.get("kind") == "model" else ("pretrain", record.get("scheme"))
    phase = (parameters.get(section) or {}).get(name) or {}
    return all(phase.get(key) in (None, (parameters.get(of) or {}).get(own)) for key, (of, own) in OF_THE_ATTACK.items())
