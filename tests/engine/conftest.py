"""Dask's processes, as on machines of a cluster, and a real SLURM."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("scheduler" or "worker", *arguments, NAME="value") -> a Dask process in a session of its own, ended with the test."""
    started = []

    def run(kind: str, *arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments, "--no-dashboard"]
        with (tmp_path / f"{kind}.log").open("ab") as log:
            started.append(
                subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
            )
        return started[-1]

    yield run
    for process in started:
        for member in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            member.kill()
        process.wait()


@pytest.fixture
def scheduler(start, tmp_path: Path) -> str:
    """Address of a scheduler without workers."""
    file = tmp_path / "scheduler.json"
    where = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    start("scheduler", *where, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="10")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # it is being written
            return json.loads(file.read_text())["address"]
        time.sleep(0.05)
    pytest.fail("the scheduler has not started")


SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SlurmctldPort={controller}
SlurmdPort={node}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SLURM of one node; yields the environment variable by which sbatch, squeue and scancel find it."""
    paths = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in PROGRAMS}
    if absent := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{', '.join(absent)} not installed")
    root = tmp_path_factory.mktemp("slurm")
    for parent in (root, *root.parents):  # munge insists that the folders of its socket can be entered
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)
    for name in ("state", "spool"):
        (root / name).mkdir()
    (root / "munge.key").touch(mode=0o600)
    (root / "munge.key").write_bytes(secrets.token_bytes(1024))
    host, memory = socket.gethostname().partition(".")[0], psutil.virtual_memory().total >> 21  # half, in MiB
    ports = {"controller": free_port(), "node": free_port()}
    values = {"root": root, "host": host, "user": getpass.getuser(), "cpus": psutil.cpu_count(), "memory": memory}
    (root / "slurm.conf").write_text(SLURM.format(**values, **ports))
    environment = {"SLURM_CONF": str(root / "slurm.conf")}
    files = {"key-file": "key", "socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    arguments = {name: ["-D"] for name in PROGRAMS}
    arguments["munged"] = ["--foreground", "--force", *(f"--{option}={root}/munge.{end}" for option, end in files.items())]
    log, running = root / "daemons.log", []
    try:
        for name in PROGRAMS:
            with log.open("ab") as output:
                command = [paths[name], *arguments[name]]
                running.append(subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output))
        deadline = time.monotonic() + 60
        while not _is_idle(environment):
            if time.monotonic() > deadline or any(process.poll() is not None for process in running):
                pytest.skip(f"SLURM does not run here: {log.read_text()[-500:]}")
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def _is_idle(environment: dict[str, str]) -> bool:
    """Whether the node takes jobs."""
    done = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() == "idle"
