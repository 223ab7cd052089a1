"""A project with an MLflow store in SQLite, looked at through MLflow's own client; and processes that are killed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from advml import config as configuration
from advml import tracking
from advml.config.store import DEFAULTS, Place, locate
from advml.tracking import store as stores

DATA = {"digest": "d" * 64, "source": "scikit-learn digits", "counts": {"train": 1257, "validation": 180, "test": 360}}
HISTORY = [{"epoch": epoch, "train/loss": 1.0 / epoch, "validation/accuracy": 0.1 * epoch} for epoch in range(1, 6)]
PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Project:
    """A folder with a store."""

    root: Path
    overrides: tuple[str, ...] = ()
    data = DATA
    history = HISTORY

    @property
    def place(self) -> Place:
        return locate(configuration.load(PARAMS, self.overrides).tracking, root=self.root)

    @property
    def store(self) -> stores.Store:
        return stores.connect(self.place)

    def having(self, *overrides: str) -> Project:
        """The same project with other parameters."""
        return Project(self.root, overrides)

    def open_run(self, *, run_id: str | None = None, discarded: str | None = None, **changes: Any) -> tracking.Run:
        """The run of a training."""
        record = {"name": "CL-AT-s0", "kind": "model", "scheme": "CL", "regime": "AT", "seed": 0, "data": DATA}
        record |= {"parameters": {"attack": {"steps": 5, "step_size": None}}} | changes
        return tracking.open_run(self.place, record=record, run_id=run_id, discarded=discarded)

    def entity(self, run_id: str) -> Any:
        return self.store.client.get_run(run_id)

    def runs(self) -> list[Any]:
        store = self.store
        return list(store.client.search_runs([store.experiment]))

    def newest(self, name: str) -> Any:
        return self.store.find(name=name)

    def steps(self, run_id: str, key: str) -> list[int]:
        return [point.step for point in self.store.client.get_metric_history(run_id, key)]

    def artifacts(self, run_id: str, folder: str | None = None) -> set[str]:
        return {entry.path for entry in self.store.client.list_artifacts(run_id, folder)}

    def sync(self) -> list[str]:
        return tracking.sync(self.place)

    def write_model(self, name: str, kind: str, *, digest: str, **more: Any) -> Path:
        """The files that a training stage leaves behind."""
        scheme, *middle, seed = name.split("-")
        folder = self.root / "models" / ("pretrain" if kind == "pretrain" else "finetune") / name
        record = {"name": name, "kind": kind, "scheme": scheme, "phase" if kind == "pretrain" else "regime": "-".join(middle)}
        record |= {"seed": int(seed[1:]), "parameters": {"attack": {"steps": 5}}, "git_commit": "c" * 40, "data": DATA, "digest": digest}
        write(folder / "model.json", record | more)
        write(self.root / "reports" / name / "history.json", HISTORY)
        (folder / "model.safetensors").write_bytes(b"")
        os.utime(folder / "model.json", (1_000_000_100, 1_000_000_100))
        return folder

    def write_evaluation(self, name: str, metrics: dict[str, float]) -> None:
        """The record of `evaluate`, of the weights as they are."""
        digest = json.loads((self.root / "models" / "finetune" / name / "model.json").read_text())["digest"]
        told = {"parameters": {"evaluate": {"steps": 7}}, "diagnostics": {"evidence": {}, "flags": [{"name": "a flag"}]}}
        write(self.root / "records" / "evaluate" / f"{name}.json", {"digest": digest, "metrics": metrics, **told})


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def project(tmp_path, empty_store) -> Project:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Project(tmp_path)


@dataclass(frozen=True)
class Fork:
    """A process that does `work` and no more; all that takes seconds to import is there already."""

    pid: int

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Fork:
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads; pytest-xdist has one, which waits
            child = os.fork()
        if child == 0:
            signal.alarm(120)
            code = 1
            try:
                work()
                code = 0
            except SystemExit as leaving:
                code = leaving.code
            finally:
                os._exit(code)
        return cls(child)

    def end(self) -> int:
        """Its exit code; minus the signal that it died of."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it is true; the fork must not have ended before."""
        while not condition():
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0)
            time.sleep(0.005)


@pytest.fixture(scope="session")
def fork() -> Callable[[Callable[[], Any]], Fork]:
    """fork(work).end() -> exit code."""
    return Fork.of
