"""What a run is given when it starts: tags, parameters and the data set."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.config import flatten
from advml.provenance import dvc_stage, git_commit
from advml.runtime.processes import this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Param
    from mlflow.entities import Run as Record

    from advml.tracking.store import Store

PARAMETER_LENGTH, NAME_LENGTH = 6000, 500  # what MLflow's tables hold
DIGEST_LENGTH = 12  # MLflow holds 36, but a table of runs has no room for them; the tag has all 64
PROCESS = "advml.process"


@dataclass(frozen=True)
class DataInfo:
    """The data set of a run: sha256 of its content, where it comes from, images per split."""

    digest: str
    source: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Facts:
    """All that is known of a run before its work begins; `kind` is pretrain, model or study."""

    name: str
    kind: str
    tags: Mapping[str, Any]
    params: Mapping[str, Any]
    data: DataInfo | None = None


def start(store: Store, facts: Facts, *, root: Path, run_id: str | None = None, start_time: int | None = None) -> Record:
    """Create the run, or take `run_id` up again where the store has it; either way it ends up with all of `facts`."""
    from mlflow.entities import RunTag

    client, tags = store.client, _tags(facts, root)
    record = get(client, run_id) if run_id else None
    if record is None:
        record = client.create_run(store.experiment, start_time=start_time, tags=tags, run_name=facts.name)
    else:
        client.update_run(record.info.run_id, status="RUNNING")
    client.log_batch(
        record.info.run_id,
        params=new_params(facts.params, known=record.data.params),
        tags=[RunTag(key, value) for key, value in tags.items() if record.data.tags.get(key) != value],
        synchronous=True,
    )
    if facts.data is not None and not (record.inputs and record.inputs.dataset_inputs):
        _log_data(client, record.info.run_id, facts.data)
    return client.get_run(record.info.run_id)


def new_params(params: Mapping[str, Any], *, known: Mapping[str, str]) -> list[Param]:
    """Nested or flat parameters as MLflow stores them, without those that a run has already: MLflow refuses to change one."""
    from mlflow.entities import Param

    return [Param(key, text) for key, text in texts_of(params).items() if key not in known]


def texts_of(params: Mapping[str, Any]) -> dict[str, str]:
    """Nested or flat parameters as the texts that MLflow keeps, by flat key."""
    return {key: ("null" if value is None else str(value))[:PARAMETER_LENGTH] for key, value in flatten(dict(params)).items()}


def get(client: MlflowClient, run_id: str) -> Record | None:
    """The run, or None if the store does not have it or it was deleted in the UI."""
    from mlflow.exceptions import MlflowException

    try:
        record = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return record if record.info.lifecycle_stage == "active" else None


def origin(made: Mapping[str, Any]) -> dict[str, str | None]:
    """Tags of a run that is made from a file: the commit is that of the file's making; stage and experiment are of no process that is."""
    return _source(made.get("git_commit"), None) | {"dvc_experiment": None}


def _source(commit: str | None, stage: str | None) -> dict[str, str | None]:
    return {
        "mlflow.source.name": f"dvc repro {stage}" if stage else "advml",
        "mlflow.source.git.commit": commit,
        "advml.dvc_stage": stage,
    }


def _tags(facts: Facts, root: Path) -> dict[str, str]:
    found = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        **_source(git_commit(root), dvc_stage()),
        "advml.name": facts.name,
        "advml.kind": facts.kind,
        "advml.data_digest": facts.data.digest if facts.data else None,
        "advml.dvc_experiment": os.environ.get("DVC_EXP_NAME"),
        PROCESS: this_process(),
        **{key if "." in key else f"advml.{key}": value for key, value in facts.tags.items()},
    }
    return {key: str(value) for key, value in found.items() if value not in (None, "")}


def _log_data(client: MlflowClient, run_id: str, data: DataInfo) -> None:
    """The data set as MLflow's UI shows it, written as a plain entity: `mlflow.data` wants the data themselves."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(
        name=data.source[:NAME_LENGTH],
        digest=data.digest[:DIGEST_LENGTH],
        source_type="advml",
        source=json.dumps({"source": data.source, "sha256": data.digest}),
        profile=json.dumps(dict(data.counts)),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return None
