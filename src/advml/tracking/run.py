"""A run of MLflow: create or resume it, log to it, end it."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from advml.core.io import read_json, sha256
from advml.core.processes import this_process
from advml.core.provenance import dvc_stage, git_commit
from advml.core.signals import deferred
from advml.tracking import store as stores
from advml.tracking.description import describe
from advml.tracking.parameters import comparable
from advml.tracking.store import COMMIT, DIGEST, MODEL, NOTE, NOW, PARENT, TABLES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

Record = Mapping[str, Any]
PARAMETER_LENGTH, NAME_LENGTH = 6000, 500  # limits of MLflow's tables
DIGITS = 4  # decimals in tables
DIGEST_LENGTH = 12  # in the table of runs, which has little room; the tag has all 64


def guarded(function: Callable) -> Callable:
    """Decorator for functions of a run: once the store has failed they do nothing and raise nothing, unless the run is `strict`."""

    @functools.wraps(function)
    def call(run: Run, *args: Any, **kwargs: Any) -> Any:
        if run.strict:
            with deferred():
                return function(run, *args, **kwargs)
        return run.store and stores.attempt(run.store.place, lambda: function(run, *args, **kwargs))

    return call


class Run:
    """Handle of one run; its `id` is None if there is no store.

    As a context manager it ends FINISHED, FAILED after an exception, or KILLED after Ctrl-C or SIGTERM (which the command line turns
    into SystemExit). What goes wrong, a `strict` run raises; another one gives the store up, with one warning line.
    """

    strict = True

    def __init__(self, store: stores.Store | None, entity: Any) -> None:
        self.store, self.client = store, store and store.client
        self.id: str | None = entity and entity.info.run_id
        self.end_time: int | None = None  # ms since 1970
        self.tags, self._params, self._metrics = (
            dict(getattr(entity.data, kind)) if entity else {} for kind in ("tags", "params", "metrics")
        )
        self._data = entity.inputs.dataset_inputs[0].dataset if entity and entity.inputs and entity.inputs.dataset_inputs else None
        self._machine: Any = None  # MLflow's system monitor, see `watch_machine`
        self._points: dict[str, dict[int, float]] = {}  # key -> epoch -> value in the store

    @classmethod
    def begin(
        cls, store: stores.Store, record: Record, *, tags: Record | None = None, run_id: str | None = None, written: int | None = None
    ) -> Self:
        """Create a run, or resume `run_id` if the store has it, and log the record.

        Args:
            record: `name`, `kind`, `parameters`, and what else of model.json is known; `title`, if the run is not called as the result.
            tags: further ones; a name without a point gets `advml.` in front.
            written: when the files of a run that is rebuilt were written, in ms since 1970; their DVC stage is not known. None: it is new.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        new = written is None
        stage = dvc_stage() if new else None
        about = {key: record.get(key) for key in ("name", "kind", "scheme", "phase", "regime", "seed")} | dict(tags or {})
        about |= {"data_digest": (record.get("data") or {}).get("digest"), "process": this_process(), "synced": None if new else "true"}
        about |= {"folder": f"{platform.node()}:{store.place.root}"}
        about |= {"dvc_stage": stage, "dvc_experiment": os.environ.get("DVC_EXP_NAME") if new else None}
        about |= {"mlflow.source.type": "LOCAL", "mlflow.source.name": f"dvc repro {stage}" if stage else "advml"}
        about |= {COMMIT: record.get("git_commit") or (git_commit(store.place.root) if new else None)}
        with contextlib.suppress(OSError, KeyError):  # in containers the user may have no name
            about["mlflow.user"] = getpass.getuser()
        wanted = {key if "." in key else f"advml.{key}": str(value) for key, value in about.items() if value not in (None, "")}
        if found := store.find(run_id=run_id) if run_id else None:
            store.client.update_run(found.info.run_id, status="RUNNING")
        else:
            found = store.client.create_run(store.experiment, start_time=written, tags=wanted, run_name=record.get("title", record["name"]))
        run = cls(store, found)
        run.end_time = written
        run.set_tags(wanted)
        run.log_params(comparable(record))
        run.log_config("training" if record.get("data") else record["kind"], record.get("parameters"))
        if (data := record.get("data")) and run._data is None:  # logged as an entity, because `mlflow.data` needs the data themselves
            source, profile = json.dumps({"source": data["source"], "sha256": data["digest"]}), json.dumps(data["counts"])
            run._data = Dataset(data["source"][:NAME_LENGTH], data["digest"][:DIGEST_LENGTH], "advml", source, profile=profile)
            run.client.log_inputs(run.id, datasets=[DatasetInput(run._data, [InputTag("mlflow.data.context", "training")])])
        run.link(record.get("pretraining"))
        return run

    def link(self, pretraining: Record | None) -> None:
        """Link the run of the pretraining, found by `name` and `digest`, if the store has it."""
        from mlflow.entities import LoggedModelInput

        if pretraining is None or PARENT in self.tags:
            return
        if parent := self.store.find(kind="pretrain", name=pretraining["name"], digest=pretraining["digest"]):
            if model := parent.data.tags.get(MODEL):
                self.client.log_inputs(self.id, models=[LoggedModelInput(model)])
            self.set_tags({PARENT: parent.info.run_id, "advml.pretraining_name": parent.info.run_name})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.finish(status)
        except (KeyboardInterrupt, SystemExit):  # raised by a signal during or before a call to the store
            self.finish(status)
            raise

    @guarded
    def finish(self, status: str = "FINISHED") -> None:
        """Set the final status (FINISHED, FAILED or KILLED)."""
        if self._machine:
            self._machine.finish()
        self.client.set_terminated(self.id, status, self.end_time)

    def watch_machine(self) -> None:
        """Log load and memory of processor and GPU every ten seconds, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is set."""
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
            self._machine = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=self.store.place.uri)
            self._machine.start()

    @guarded
    def log_epochs(self, records: Sequence[Record], *, at: int | None = None) -> None:
        """Log, in one call, points of curves that are missing or different in the store.

        Give the whole history every time ({'epoch': 3, 'train/loss': 0.1, ...}, ...): what a killed or repeated epoch left behind is
        neither doubled nor missed. MLflow deletes no point: of two at one epoch, the later one counts. `at`: in ms since 1970.
        """
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [
            Metric(key, value, now if at is None or record["epoch"] in known else at, record["epoch"])
            for record in records
            for key, value in _numbers(record).items()
            if key != "epoch" and repr(value) != repr((known := self._known_points(key)).get(record["epoch"]))  # repr, because NaN != NaN
        ]
        self.client.log_batch(self.id, metrics=points, synchronous=True)
        for point in points:
            self._points[point.key][point.step] = point.value

    def _known_points(self, key: str) -> dict[int, float]:
        """Points of one curve in the store, by epoch; requested once per key, and only if the run had the curve when opened."""
        if key not in self._points:
            history = self.client.get_metric_history(self.id, key) if key in self._metrics else []
            self._points[key] = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        return self._points[key]

    def log_metrics(self, metrics: Record, *, replaced: Sequence[str] = ()) -> None:
        """Log new and changed final metrics, to the run and to its model.

        Those that the run has, that `metrics` lacks, and whose first word (`accuracy` of `accuracy/clean`) is one of `replaced`,
        become NaN: MLflow deletes none, and an earlier value would pass for today's.
        """
        from mlflow.entities import Metric

        now, about = int(1000 * time.time()), {"model_id": self.tags.get(MODEL)}
        if self._data:
            about |= {"dataset_name": self._data.name, "dataset_digest": self._data.digest}
        gone = {key: math.nan for key in self._metrics if key.partition("/")[0] in replaced}
        changed = {key: value for key, value in (gone | _numbers(metrics)).items() if repr(value) != repr(self._metrics.get(key))}
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, 0, **about) for key, value in changed.items()], synchronous=True)
        self._metrics |= changed

    def log_params(self, params: Record) -> None:
        """Add missing parameters. MLflow never changes existing ones, so changed values are logged as tags."""
        from mlflow.entities import Param

        texts = {key: ("null" if value is None else str(value))[:PARAMETER_LENGTH] for key, value in params.items()}
        fresh = {key: text for key, text in texts.items() if key not in self._params}
        self.client.log_batch(self.id, params=[Param(*one) for one in fresh.items()], synchronous=True)
        self._params |= fresh
        self.set_tags({f"{NOW}{key}": text if text != self._params[key] else None for key, text in texts.items()})

    def log_config(self, part: str, parameters: Record | None) -> None:
        """Store all parameters of a kind of result as `config/<part>.yaml`, resolved and nested as in params.yaml."""
        if parameters:
            self.client.log_dict(self.id, dict(parameters), f"config/{part}.yaml")

    def log_table(self, rows: Sequence[Record], path: str) -> None:
        """Store rounded rows as table `path` (.json) for the UI; MLflow's log_table would append to the rows of an earlier process."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[round(cell, DIGITS) if isinstance(cell := row.get(key), float) else cell for key in columns] for row in rows]
        self.client.log_dict(self.id, {"columns": columns, "data": cells}, path)
        table, tables = {"path": path, "type": "table"}, json.loads(self.tags.get(TABLES, "[]"))
        self.set_tags({} if table in tables else {TABLES: json.dumps([*tables, table])})

    def log_checkpoint(self, folder: Path, *, digest: str) -> None:
        """Log the checkpoint as a model, see `_log_files`. The tag DIGEST is set last, and marks the run as complete."""
        from mlflow.entities import LoggedModelOutput

        if self.tags.get(DIGEST) == digest:  # a stage killed after this point repeats the call
            return
        root, known = self.store.place.root, (Path(os.path.abspath(folder)), folder.resolve())  # the first as named in the study
        path = next((path.relative_to(root).as_posix() for path in known if path.is_relative_to(root)), str(known[0]))
        self.set_tags({"advml.path": path})
        tags = {key: value for key, value in self.tags.items() if key.startswith("advml.") or key == NOTE} | {DIGEST: digest}
        about = {"model_type": tags["advml.kind"], "params": {"path": path, "sha256": digest}, "source_run_id": self.id}
        model = self.client.create_logged_model(self.store.experiment, name=tags["advml.name"], tags=tags, **about)
        _log_files(self.client, model, folder, root=root, path=path, digest=digest)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        self.set_tags({MODEL: model.model_id, DIGEST: digest})

    def log_picture(self, file: Path, *, key: str) -> None:
        """Add a picture to the UI's image grid if it has changed; the grid keeps every picture."""
        from PIL import Image

        if self.tags.get(tag := f"advml.image.{key}") != (made := sha256(file)):
            with Image.open(file) as image:
                self.client.log_image(self.id, image.copy(), key=key, step=0)
            self.set_tags({tag: made})

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set changed tags in this order (None: delete), then update the description, which is made from tags."""
        for key, value in tags.items():
            if value is None and key in self.tags:
                self.client.delete_tag(self.id, key)
                del self.tags[key]
            elif value not in (None, self.tags.get(key)):
                self.client.set_tag(self.id, key, value, synchronous=True)
                self.tags[key] = value
        if (text := describe(self.tags, run=self.id, experiment=self.store.experiment)) and NOTE not in tags:
            self.set_tags({NOTE: text})


def open_run(place: stores.Place, *, record: Record, run_id: str | None = None, discarded: str | None = None) -> Run:
    """Start the run of a training, or resume a killed one, `run_id`. Never raises: without a store the run does nothing.

    The record is what model.json will hold; `discarded` a run of other inputs, which a process that is gone has left RUNNING.
    """

    def begin() -> Run:
        store = stores.connect(place)
        if discarded and (orphan := store.find(run_id=discarded)) and orphan.info.status == "RUNNING":
            store.client.set_terminated(discarded, "KILLED")
        run = Run.begin(store, record, run_id=run_id)
        run.watch_machine()
        return run

    run = stores.attempt(place, begin) or Run(None, None)
    run.id, run.strict = run.id or run_id, False  # the id is kept without a store, so that a later resume finds the run
    return run


def _numbers(values: Record) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if isinstance(value, Real)}


# Checkpoints as logged models of MLflow: weights stay where DVC keeps them, and are found by path and sha256. What the store holds is text:
# model.json, and of a classifier the MLmodel file and weights.json, by which `models.pyfunc` loads it.

LOADER, WEIGHTS = "advml.models.pyfunc", "weights.json"


def _log_files(client: MlflowClient, model: LoggedModel, folder: Path, *, root: Path, path: str, digest: str) -> None:
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
