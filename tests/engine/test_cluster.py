"""Stages on workers of a Dask scheduler: each test has one of its own, on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from dask.system import CPU_COUNT
from ruamel.yaml import YAML

from advml.config import Cluster
from advml.core.errors import Failure, UserError
from advml.engine import stage_task
from advml.engine.cluster import Slots, connect

# What `advml.cli.main` does under an engine, and then a stage that waits for a file.
STAGE = """
import os, sys, time
from advml.core.processes import PARENT, end_with
end_with(int(os.environ[PARENT]))
print(os.getpid(), file=open(sys.argv[1] + ".pid", "w"), flush=True)
while not os.path.exists("go"):
    time.sleep(0.02)
print(os.environ["OMP_NUM_THREADS"], os.environ.get("MLFLOW_TRACKING_URI"), file=open(sys.argv[1], "w"))
"""
DRIVER = """
import sys
from pathlib import Path
from advml.config import Cluster
from advml.pipeline.repro import repro
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


def driver(study: Path, where: str, options: str = "", **settings: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | settings
    command = [sys.executable, "-c", DRIVER.format(options=options), where]
    return subprocess.Popen(command, cwd=study, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_driver_that_ends_leaves_nothing_at_work_and_the_next_one_goes_on(study, scheduler, start):
    start("worker", scheduler, "--nthreads", "1")
    ended = []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = driver(study, scheduler)
        wait_for(lambda: pid(study) not in (None, *ended), process)
        stage = psutil.Process(pid(study))
        ended.append(stage.pid)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode != 0
        if number == signal.SIGINT:  # it waits for the end of its stages
            with contextlib.suppress(psutil.NoSuchProcess):
                assert stage.status() == psutil.STATUS_ZOMBIE
        assert psutil.wait_procs([stage], timeout=TIMEOUT)[1] == []

    process = driver(study, scheduler, MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    wait_for(lambda: pid(study) not in ended, process)
    (study / "go").touch()
    told, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, told.strip()) == (0, "['one']"), said
    assert (study / "one").read_text().split() == [str(CPU_COUNT), "http://127.0.0.1:1"]


def test_a_job_of_a_queue_that_is_killed_is_submitted_again(study):
    """dask-jobqueue's jobs as processes of this machine, over an encrypted line; its real queues differ in the commands."""
    process = driver(
        study, "local", "slots=2, memory='1GB', options={'death_timeout': 50}", DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT="0.1s"
    )
    wait_for(lambda: pid(study) is not None, process)
    first = psutil.Process(pid(study))
    job = psutil.Process(process.pid).children(recursive=True)
    assert any("tls://" in word for member in job for word in member.cmdline())
    for member in job:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "distributed.cli.dask_worker" in member.cmdline() or "spawn_main" in " ".join(member.cmdline()):
                member.kill()
    wait_for(lambda: pid(study) != first.pid, process)
    assert not first.is_running()
    (study / "go").touch()
    told, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, told.strip()) == (0, "['one']"), said
    assert (study / "one").read_text().split() == [str(max(1, CPU_COUNT // 2)), "None"]
    assert list((study / stage_task.FOLDER / "jobs").glob("*cert*")) == []


@pytest.mark.parametrize(
    ("where", "options", "told"),
    [
        ("slrum", {}, "slurm"),
        ("tcp://127.0.0.1:1", {}, "tcp://127.0.0.1:1"),
        ("tls://127.0.0.1:1", {}, "DASK_DISTRIBUTED__COMM__TLS__CA_FILE"),
        ("pbs", {"gpus": 1}, "cluster.gpus"),
        ("slurm", {"options": {"no_such": 1}}, "cluster"),
        ("pbs", {"memory": "1GB"}, "qsub"),  # which is not installed
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, where, options, told):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("advml.engine.cluster.PATIENCE", 0.2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match=told), connect(where, root=tmp_path, jobs=1, options=Cluster(**options)):
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_a_machine_that_does_not_see_the_study_is_named(tmp_path):
    with pytest.raises(Failure, match=str(tmp_path)):
        stage_task.require_shared(str(tmp_path), "token")
    (tmp_path / stage_task.FOLDER).mkdir(parents=True)
    stage_task.token_file(tmp_path, "of another command").touch()
    with pytest.raises(Failure, match=os.uname().nodename):
        stage_task.require_shared(str(tmp_path), "token")
    stage_task.token_file(tmp_path, "token").touch()
    stage_task.require_shared(str(tmp_path), "token")
    stage_task.token_file(tmp_path, "token").write_text("digest of other sources")
    with pytest.raises(Failure, match=f"{os.uname().nodename}.*other sources"):
        stage_task.require_shared(str(tmp_path), "token")


def test_a_worker_without_advml_is_named(tmp_path, scheduler, start):
    (tmp_path / "bare" / "advml").mkdir(parents=True)
    (tmp_path / "bare" / "advml" / "__init__.py").touch()
    start("worker", scheduler, "--no-nanny", PYTHONPATH=str(tmp_path / "bare"))
    wait_for(lambda: "Registered" in (tmp_path / "worker.log").read_text())
    with pytest.raises(Failure, match=r"worker tcp://127.0.0.1:\d+ .*advml"), connect(scheduler, root=tmp_path, jobs=1, options=Cluster()):
        pass


def test_that_there_is_no_worker_is_said_again_now_and_then(monkeypatch, capsys):
    client = SimpleNamespace(nthreads=dict, scheduler=SimpleNamespace(address="tcp://10.0.0.1:8786"))
    slots = Slots(client, "token")
    assert [slots.count(), slots.count()] == [0, 0] and capsys.readouterr().err.count("tcp://10.0.0.1:8786") == 1
    monkeypatch.setattr("advml.engine.cluster.REMINDER", 0)
    assert slots.count() == 0 and capsys.readouterr().err.count("\n") == 1


def test_an_address_with_a_password_is_not_sent_to_workers(monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for address, is_sent in (("http://10.0.0.1:5000", True), ("postgresql://ann@host/runs", True), ("https://ann:S3CRET@host", False)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert stage_task.sent_environment(remark=True) == ({"MLFLOW_TRACKING_URI": address} if is_sent else {})
        said = capsys.readouterr().err
        assert ("MLFLOW_TRACKING_URI" in said, "S3CRET" in said) == (not is_sent, False)


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
