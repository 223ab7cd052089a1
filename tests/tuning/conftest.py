"""Shared by the tests of searches: processes that import little, and the folder they import toys from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from advml.engine.fork_server import server
from advml.tuning import command, storage
from advml.tuning import study as studies
from advml.tuning.search import Attempt, Search
from advml.tuning.storage import address
from advml.tuning.study import finished

HERE = str(Path(__file__).parent)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def light_server() -> Iterator[dict[str, str]]:
    """Processes of these tests are forked from one that has imported what they need, which is not torch."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, before)))
    try:
        from toy_search import MODULES

        with server(REPOSITORY, MODULES) as environment:
            yield environment
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "POLL", 0.1)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A studies' database without studies."""
    path = tmp_path_factory.mktemp("database") / "optuna.db"
    storage.connect(address(None, root=path.parent)).engine.dispose()
    return path


@pytest.fixture(autouse=True)
def copied_database(request: pytest.FixtureRequest, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the tables takes half a second, so new databases are copies, unless a test asks for `fresh_database`."""
    whole = storage.connect

    def connect(url: str) -> optuna.storages.RDBStorage:
        file = Path(url.removeprefix(storage.SQLITE))
        if url.startswith(storage.SQLITE) and file.parent.is_dir() and not file.exists():
            for path in empty_database.parent.glob("optuna.db*"):
                shutil.copy(path, file.with_name(path.name.replace("optuna.db", file.name)))
        return whole(url)

    if "fresh_database" not in request.fixturenames:
        monkeypatch.setattr(studies, "connect", connect)


@pytest.fixture
def fresh_database() -> None:
    """The tables of new databases are made, as they are for users."""


@pytest.fixture
def run_here(tmp_path: Path) -> Callable[..., list[FrozenTrial]]:
    """run_here(search, total=8) -> all trials of the study after that many have run, one by one, in this process."""

    def go(search: Search, *, total: int) -> list[FrozenTrial]:
        study, objective = studies.create(search, address(None, root=tmp_path)), search.open().objective
        studies.requeue_dead(study)
        while len(finished(study.get_trials())) < total:
            trial = studies.next_trial(study, search)
            scratch = tmp_path / "scratch" / f"trial-{trial.user_attrs['origin']}"
            attempt = Attempt(dict(trial.params), scratch, lambda report, trial=trial: studies.note(trial, *report))
            studies.finish(study, trial, attempt.run(objective))
        return study.get_trials()

    return go


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A workspace that looks as if everything had been trained."""
    for name in ("pretrain/CL-at-s0", "pretrain/SL-at-s0", "pretrain/CL-st-s0", "finetune/CL-AT-s0"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.json").write_text(
            json.dumps({"digest": name.partition("/")[2].removesuffix("-s0"), "data": {"digest": "2"}})
        )
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    (tmp_path / "data" / "prepared" / "dataset.json").write_text('{"digest": "2"}')
    return tmp_path


@pytest.fixture
def driver(study: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """driver(pause=1) -> the command as a process of its own, see `killing.start`; killed at the end."""
    from killing import start

    started = []
    yield lambda **options: started.append(start(study.root, **options)) or started[-1]
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()
