"""Shared by all tests: a clean environment, tiny data, a study in a temporary folder, and the real command line.

Starting `python -m advml` costs seconds of imports. The tests therefore run a command in their own process, or, where it is to be killed
or is to start processes itself, as `advml repro` does: forked from a server that has imported torch, timm and mlflow once (see
`advml.engine.fork_server`).
"""

from __future__ import annotations

import contextlib
import io
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from advml import cli
from advml import config as configuration
from advml.config.store import Place, locate
from advml.core import provenance, signals
from advml.core.paths import Workspace
from advml.core.provenance import source_digest
from advml.engine.fork_server import ADDRESS, server
from advml.tracking import store as stores

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a forked process would wait for threads of its parent

if TYPE_CHECKING:  # pytest-xdist's own process reads this file too, and its workers wait for it: what needs torch imports it when called
    from advml.data.datasets import Dataset, Split
    from advml.models.network import Network
    from advml.pipeline.context import Context

REPOSITORY = Path(__file__).parents[1]
# What reaches into a process from outside: DVC's, MLflow's and our own variables.
FOREIGN = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "ADVML_BOARD", ADDRESS)
# A study that trains in a second: a few steps of everything.
TINY = (
    "attack.steps=2",
    "evaluate.steps=2",
    *(
        "diagnostics.images=8",
        "diagnostics.steps=2",
        "diagnostics.shares=[1]",
        "corruptions.names=[contrast, fog]",
        "corruptions.severities=[1, 5]",
    ),
    *(f"worst_case.{key}" for key in ("restarts=1", "steps=2", "targets=2", "queries=5")),
    *(f"{phase}.{key}" for phase in ("pretrain.SL", "pretrain.CL", "pretrain.SCL") for key in ("epochs=2", "batch_size=32")),
    *(f"regimes.{regime}.{key}" for regime in ("ST", "AT", "Partial-AT", "Full-AT") for key in ("epochs=2", "batch_size=32")),
    "runtime.device=cpu",
)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_synced_to_disk() -> None:
    """A database need not survive a loss of power here; waiting for the disk takes longer than the arithmetic of a tiny study."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "connect")
    def unsynced(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session", autouse=True)
def blank_figures() -> Iterator[Callable[..., object]]:
    """Figures are of the right size and empty, for the same reason; `drawing` has them drawn after all."""
    from matplotlib.figure import Figure

    draw = Figure.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda *_: None)
        yield draw


@pytest.fixture(scope="session")
def drawing(blank_figures: Callable[..., object]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """with drawing(): figures are drawn after all."""
    from matplotlib.figure import Figure

    @contextlib.contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "draw", blank_figures)
            yield

    return drawn


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Commands that run in this process set handlers for good, by which a second Ctrl-C within seconds of a first one does not count."""
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine, and no store given up in an earlier test, reaches a test."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stores, "_broken", set())


def patterns(count: int, *, seed: int, classes: int = 4, channels: int = 1, side: int = 8) -> Split:
    """Noisy copies of one random picture per class: easy to learn, and different under every seed."""
    import torch

    from advml.data.datasets import Split

    pictures = torch.rand(classes, channels, side, side, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    noise = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
    images = 0.6 * pictures[labels] + 0.4 * noise
    return Split((255 * images).round().to(torch.uint8), labels)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """96 training, 32 validation and 40 test images of four classes, 1 x 8 x 8."""
    from advml.data.datasets import Dataset, channel_statistics
    from advml.data.prepared import digest

    splits = {"train": patterns(96, seed=1), "validation": patterns(32, seed=2), "test": patterns(40, seed=3)}
    classes = ("ash", "birch", "cedar", "dogwood")
    mean, std = channel_statistics(splits["train"].images)
    parameters = configuration.load(REPOSITORY / "params.yaml").data.model_dump(mode="json")
    return Dataset(**splits, classes=classes, source="patterns", digest=digest(splits, classes), mean=mean, std=std, parameters=parameters)


@pytest.fixture
def make_network(dataset: Dataset) -> Callable[..., Network]:
    """make_network(seed=1, projection_size=None) builds a small network for the images of `dataset`, with both heads by default."""
    from advml.models.network import Architecture, build

    def make(*, seed: int = 0, **changes: object) -> Network:
        values = {
            "backbone": "test_resnet",
            "stem": "small",
            "options": {},
            "channels": 1,
            "image_size": 8,
            "mean": dataset.mean,
            "std": dataset.std,
            "classes": len(dataset.classes),
            "projection_size": 16,
            "normalize_logits": False,
            "dual_batch_norm": False,
        }
        return build(Architecture(**(values | changes)), seed=seed)

    return make


@dataclass(frozen=True)
class Study:
    """A folder with params.yaml, prepared data and an empty MLflow store."""

    root: Path

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root)

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    def config(self, *overrides: str) -> configuration.Config:
        return configuration.load(self.params, overrides)

    def context(self, *overrides: str) -> Context:
        """What the command line hands to a stage."""
        from advml.pipeline.context import Context

        return Context(self.config(*overrides), self.workspace)

    def copy(self, folder: Path) -> Study:
        return Study(Path(shutil.copytree(self.root, folder)))

    def place(self, *overrides: str) -> Place:
        return locate(self.config(*overrides).tracking, root=self.root)

    def store(self, *overrides: str) -> stores.Store:
        return stores.connect(self.place(*overrides))

    def runs(self) -> list[tuple[str, str]]:
        """(name, status) of all MLflow runs, oldest first."""
        store = self.store()
        found = store.client.search_runs([store.experiment], order_by=["attributes.start_time ASC"])
        return [(run.info.run_name, run.info.status) for run in found]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs; making one takes seconds, so studies copy it. Its experiment is none of theirs."""
    root = tmp_path_factory.mktemp("store")
    stores.connect(locate(configuration.Tracking(experiment="empty"), root=root))
    return root / "mlflow.db"


@pytest.fixture(scope="session")
def new_study(dataset: Dataset, empty_store: Path) -> Callable[..., Study]:
    """new_study(folder, "seeds=[1]") makes a study in a new folder, with tiny parameters and these overrides."""
    from advml.data.datasets import save

    @cache  # writing YAML takes as long as training a step
    def parameters(*overrides: str) -> str:
        return configuration.dump(configuration.load(REPOSITORY / "params.yaml", [*TINY, *overrides]))

    def make(root: Path, *overrides: str) -> Study:
        study = Study(root)
        study.root.mkdir()
        study.params.write_text(parameters(*overrides), encoding="utf-8")
        save(dataset, study.workspace.prepared)
        shutil.copy(empty_store, study.root / "mlflow.db")
        return study

    return make


@pytest.fixture
def make_study(tmp_path: Path, new_study: Callable[..., Study]) -> Callable[..., Study]:
    """make_study("first", "seeds=[1]") makes a study in the test's own folder."""
    return lambda name="study", *overrides: new_study(tmp_path / name, *overrides)


@dataclass(frozen=True)
class Sources:
    """A copy of the sources; by it stages judge what is up to date, and DVC where it lies beside dvc.yaml."""

    package: Path

    def edit(self, file: str) -> None:
        """Add a comment to a source."""
        with (self.package / file).open("a", encoding="utf-8") as source:
            source.write("# edited\n")
        source_digest.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    root = tmp_path / "sources"
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    monkeypatch.setattr(provenance, "PACKAGE", root / "src" / "advml")
    source_digest.cache_clear()
    yield Sources(root / "src" / "advml")
    source_digest.cache_clear()


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study()


@pytest.fixture(scope="session")
def warm() -> Iterator[dict[str, str]]:
    """Environment of commands that are forked from a process with all imports done."""
    with server(REPOSITORY) as environment:
        while environment and not Path(environment[ADDRESS]).exists():  # a command that comes too early would do its own imports
            time.sleep(0.01)
        yield environment


@dataclass(frozen=True)
class Shell:
    """Runs advml in a folder."""

    environment: Callable[[], dict[str, str]]

    def start(self, *arguments: str, cwd: Path, background: bool = False) -> subprocess.Popen[str]:
        """As a shell starts a process; in the `background`, where Ctrl-C is ignored, or not, whatever the test runner itself ignores."""
        return subprocess.Popen(
            [sys.executable, "-m", "advml", *arguments],
            cwd=cwd,
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (
                signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL),
                signal.signal(signal.SIGHUP, signal.SIG_DFL),
            ),
        )

    def process(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """As a process of its own, from start to end."""
        process = self.start(*arguments, cwd=cwd)
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def __call__(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """In this process, whose folder, environment, signals and hooks are as before in the end."""
        said, told, environment = io.StringIO(), io.StringIO(), dict(os.environ)
        handlers = {number: signal.getsignal(number) for number in signals.ENDING}
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            patch.setattr(sys, "argv", ["advml", *arguments])
            patch.setattr(sys, "excepthook", sys.excepthook)
            patch.chdir(cwd)
            try:
                cli.main()
            except SystemExit as left:
                code = left.code
            finally:
                os.environ.clear()
                os.environ.update(environment)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return subprocess.CompletedProcess(arguments, code or 0, said.getvalue(), told.getvalue())


@pytest.fixture(scope="session")
def advml(request: pytest.FixtureRequest) -> Shell:
    """advml("show", "CL-AT-s0", cwd=folder) -> exit code, stdout and stderr of the real command."""
    return Shell(lambda: request.getfixturevalue("warm"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server: that of ADVML_POSTGRES_URL, or one started from Debian's packages."""
    given = os.environ.get("ADVML_POSTGRES_URL")
    if given:
        yield given
        return
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert programs, "install Debian's package postgresql, or name a server in ADVML_POSTGRES_URL"
    with tempfile.TemporaryDirectory(prefix="advml-postgres-") as name, contextlib.ExitStack() as cleaning:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data").mkdir()
        user = {}
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            who = next(one for name in ("postgres", "nobody") for one in pwd.getpwall() if one.pw_name == name)
            os.chown(folder / "data", who.pw_uid, who.pw_gid)
            user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": [], "cwd": folder}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        data = str(folder / "data")
        options = {"check": True, "stdout": subprocess.DEVNULL, **user}
        subprocess.run([programs[-1] / "initdb", "-D", data, "-U", "advml", "--auth=trust", "--no-sync", "-E", "UTF8"], **options)
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off -c max_connections=100"
        log = str(folder / "data" / "log")
        subprocess.run([programs[-1] / "pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "start"], **options)
        cleaning.callback(subprocess.run, [programs[-1] / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **options)
        yield f"postgresql+psycopg://advml@127.0.0.1:{port}/postgres"


@pytest.fixture(scope="session")
def new_database(postgres: str) -> Iterator[Callable[[], str]]:
    """new_database() -> the address of an empty database in PostgreSQL, dropped in the end."""
    from sqlalchemy import NullPool, create_engine, make_url, text

    def execute(statement: str) -> None:
        with create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
            connection.execute(text(statement))

    with contextlib.ExitStack() as cleaning:

        def make() -> str:
            name = f"advml_{uuid.uuid4().hex[:12]}"
            execute(f"CREATE DATABASE {name}")
            cleaning.callback(execute, f"DROP DATABASE {name} WITH (FORCE)")
            return make_url(postgres).set(database=name).render_as_string(hide_password=False)

        yield make
