"""Stages on workers of a Dask scheduler: each test has one of its own, on this machine, with workers in sessions of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from dask.system import CPU_COUNT
from ruamel.yaml import YAML

from advml.config import Cluster
from advml.engine import stage_task
from advml.engine.cluster import connect
from advml.errors import Failure, UserError

# What `advml.cli.main` does under an engine, and then a stage that waits for a file.
STAGE = """
import os, sys, time
from advml.engine.parent import PARENT, end_with
end_with(int(os.environ[PARENT]))
print(os.getpid(), file=open(sys.argv[1] + ".pid", "w"), flush=True)
while not os.path.exists("go"):
    time.sleep(0.02)
open(sys.argv[1], "w").write(os.environ["OMP_NUM_THREADS"])
"""
DRIVER = """
import sys
from pathlib import Path
from advml.config import Cluster
from advml.repro import repro
print(repro(Path(), jobs=1, cluster=sys.argv[1], options=Cluster({options})))
"""
TIMEOUT = 60.0


@pytest.fixture
def study(tmp_path) -> Path:
    """A DVC repository of one stage."""
    root = tmp_path / "study"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (root / "stage.py").write_text(STAGE)
    with (root / "dvc.yaml").open("w") as file:
        YAML(typ="safe").dump({"stages": {"one": {"cmd": "python stage.py one", "outs": ["one"]}}}, file)
    return root


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("scheduler" or "worker", ...) -> a Dask process in a session of its own, ended with the test."""
    started = []

    def run(kind: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments, "--no-dashboard"]
        with (tmp_path / f"{kind}.log").open("ab") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        for member in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            member.kill()
        process.wait()


@pytest.fixture
def scheduler(start, tmp_path) -> str:
    """Address of a scheduler with one worker of one slot."""
    file = tmp_path / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    start("worker", "--scheduler-file", str(file), "--nthreads", "1")
    wait_for(file.exists)
    return YAML(typ="safe").load(file)["address"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid(study: Path) -> int | None:
    """Process id of the stage at work."""
    file = study / "one.pid"
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text else None


def driver(study: Path, where: str, options: str = "") -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", DRIVER.format(options=options), where]
    return subprocess.Popen(command, cwd=study, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_worker_costs_the_stage_nothing_but_time_and_a_killed_driver_leaves_nothing_at_work(study, scheduler):
    process = driver(study, scheduler)
    wait_for(lambda: pid(study) is not None, process)
    first = psutil.Process(pid(study))
    worker = next(one for one in first.parents() if "multiprocessing" in " ".join(one.cmdline()))
    worker.kill()
    wait_for(lambda: pid(study) not in (None, first.pid), process)
    second = psutil.Process(pid(study))
    assert not first.is_running()

    process.kill()
    process.communicate()
    assert psutil.wait_procs([second], timeout=TIMEOUT)[1] == []

    process = driver(study, scheduler)
    wait_for(lambda: pid(study) not in (None, first.pid, second.pid), process)
    (study / "go").touch()
    told, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, told.strip()) == (0, "['one']"), said
    assert (study / "one").read_text() == str(CPU_COUNT)


def test_an_interrupted_driver_ends_the_stage_on_the_worker(study, scheduler):
    process = driver(study, scheduler)
    wait_for(lambda: pid(study) is not None, process)
    stage = psutil.Process(pid(study))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0 and (not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)


def test_jobs_of_a_queue_run_the_stages_over_an_encrypted_line(study):
    """dask-jobqueue's jobs as processes of this machine; its real queues differ in the command that submits them."""
    (study / "go").touch()
    process = driver(study, "local", "slots=2, memory='1GB', options={'death_timeout': 50}")
    told, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, told.strip()) == (0, "['one']"), said
    assert (study / "one").read_text() == str(max(1, CPU_COUNT // 2))
    assert list((study / stage_task.FOLDER / "jobs").glob("*cert*")) == []


@pytest.mark.parametrize(
    ("where", "options", "told"),
    [
        ("slrum", {}, "slurm"),
        ("tcp://127.0.0.1:1", {}, "tcp://127.0.0.1:1"),
        ("tls://127.0.0.1:1", {}, "DASK_DISTRIBUTED__COMM__TLS__CA_FILE"),
        ("pbs", {"gpus": 1}, "cluster.gpus"),
        ("slurm", {"options": {"no_such": 1}}, "cluster"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(tmp_path, monkeypatch, where, options, told):
    monkeypatch.setattr("advml.engine.cluster.PATIENCE", 0.2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match=told), connect(where, root=tmp_path, jobs=1, options=Cluster(**options)):
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_a_machine_that_does_not_see_the_study_is_named(tmp_path):
    with pytest.raises(Failure, match=str(tmp_path)):
        stage_task.require_shared(str(tmp_path), "token")
    (tmp_path / stage_task.FOLDER).mkdir(parents=True)
    (tmp_path / stage_task.FOLDER / "token").write_text("of another study")
    with pytest.raises(Failure, match=os.uname().nodename):
        stage_task.require_shared(str(tmp_path), "token")
    (tmp_path / stage_task.FOLDER / "token").write_text("token")
    stage_task.require_shared(str(tmp_path), "token")


def test_a_local_engine_takes_no_connection_from_another_machine(tmp_path):
    with connect(None, root=tmp_path, jobs=3, options=Cluster()) as slots:
        assert slots.count() == 3
        listening = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1"}


@pytest.fixture
def certificates(tmp_path) -> Callable[[str], dict[str, Path]]:
    """certificates("name") -> files of a new authority and of a certificate that it has signed: ca, cert, key."""

    def make(name: str) -> dict[str, Path]:
        found = {kind: tmp_path / f"{name}-{kind}.pem" for kind in ("authority", "ca", "request", "cert", "key")}
        new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj"]
        signed = ["-x509", "-keyout", found["authority"], "-out", found["ca"]]
        subprocess.run([*new, f"/CN={name}", *signed], check=True, capture_output=True)
        subprocess.run([*new, "/CN=advml", "-keyout", found["key"], "-out", found["request"]], check=True, capture_output=True)
        sign = ["openssl", "x509", "-req", "-CA", found["ca"], "-CAkey", found["authority"], "-CAcreateserial"]
        subprocess.run([*sign, "-in", found["request"], "-out", found["cert"]], check=True, capture_output=True)
        return found

    return make


@pytest.mark.servers
def test_a_scheduler_with_certificates_refuses_drivers_without_one(study, start, certificates, tmp_path, monkeypatch):
    def trust(found: dict[str, Path]) -> None:
        for name, kind in (("CA_FILE", "ca"), ("CLIENT__CERT", "cert"), ("CLIENT__KEY", "key")):
            monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{name}", str(found[kind]))

    ours, file = certificates("ours"), tmp_path / "scheduler.json"
    options = [word for name, kind in (("ca-file", "ca"), ("cert", "cert"), ("key", "key")) for word in (f"--tls-{name}", str(ours[kind]))]
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", "tls", "--scheduler-file", str(file), *options)
    wait_for(file.exists)
    address = YAML(typ="safe").load(file)["address"]
    start("worker", address, "--nthreads", "1", *options)
    (study / "go").touch()

    def outcome(where: str) -> tuple[int, str, str]:
        process = driver(study, where)
        return *reversed(process.communicate(timeout=TIMEOUT)), process.returncode

    assert address.startswith("tls://")
    for where in (address, address.replace("tls:", "tcp:")):  # without a certificate
        said, _, code = outcome(where)
        assert code and f"UserError: --cluster {where}" in said.splitlines()[-1]
    trust(certificates("theirs"))
    said, _, code = outcome(address)
    assert code and f"UserError: --cluster {address}" in said.splitlines()[-1]
    assert not (study / "one").exists()
    trust(ours)
    said, told, code = outcome(address)
    assert (code, told.strip()) == (0, "['one']"), said
