"""Shared by the tests of searches: workers that import little, and the folder they import toys from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial

from advml.tuning import census, storage, supervisor
from advml.tuning import study as studies
from advml.tuning.storage import address
from advml.tuning.worker import Orders, Search, work


@pytest.fixture(autouse=True)
def light_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests run in other processes needs no torch, and finds imported what it does need."""
    monkeypatch.setattr(supervisor, "PRELOADED", ["advml.tuning.worker", "advml.tuning.outputs", *supervisor.LAZY])
    monkeypatch.setattr(supervisor, "POLL", 0.1)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A studies' database without studies."""
    path = tmp_path_factory.mktemp("database") / "optuna.db"
    storage._create(path)
    return path


@pytest.fixture(autouse=True)
def copied_database(request: pytest.FixtureRequest, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the tables takes half a second, so new databases are copies, unless a test asks for `fresh_database`."""
    if "fresh_database" not in request.fixturenames:
        monkeypatch.setattr(storage, "_create", lambda database: shutil.copy(empty_database, database))


@pytest.fixture
def fresh_database() -> None:
    """The tables of new databases are made, as they are for users."""


Run = Callable[..., list[FrozenTrial]]


@pytest.fixture
def run_here(tmp_path: Path) -> Run:
    """run_here(search, total=8) -> the same as `run` by one worker, which is this process: for what does not depend on who works."""

    def go(search: Search, *, total: int) -> list[FrozenTrial]:
        where = address(None, root=tmp_path)
        study = studies.create(search.definition(), where)
        studies.bury(study, where)
        work(Orders(search, where, total, len(census.finished(study.get_trials())), 0, tmp_path / "scratch"), 0)
        return study.get_trials()

    return go


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(search, total=8, workers=2) -> all trials of the study afterwards; again: the next command."""

    def go(
        search: Search,
        *,
        total: int,
        workers: int = 1,
        watch: Callable[[Sequence[FrozenTrial]], None] = lambda trials: None,
        url: str | None = None,
    ) -> list[FrozenTrial]:
        where = address(url, root=tmp_path)
        study = studies.create(search.definition(), where)
        studies.bury(study, where)
        orders = Orders(search, where, total, len(census.finished(study.get_trials())), 0, tmp_path / "scratch")
        try:
            supervisor.supervise(study, orders, workers=workers, watch=watch)
        finally:
            trials = study.get_trials()
            study._storage._backend.engine.dispose()
        return trials

    return go


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A workspace that looks as if everything had been trained."""
    for name in ("pretrain/CL-at-s0", "pretrain/SL-at-s0", "pretrain/CL-st-s0", "finetune/CL-AT-s0"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.json").write_text(json.dumps({"digest": name.partition("/")[2].removesuffix("-s0")}))
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    (tmp_path / "data" / "prepared" / "dataset.json").write_text('{"digest": "2"}')
    return tmp_path


@pytest.fixture
def trials_of(tmp_path: Path) -> Callable[[str], list[FrozenTrial]]:
    """What the study of this name holds."""

    def read(name: str) -> list[FrozenTrial]:
        return optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'optuna.db'}").get_trials()

    return read
