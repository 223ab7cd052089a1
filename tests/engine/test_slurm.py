"""A real SLURM on this machine: controller, node and authentication from the system's packages, in a folder of the test."""

from __future__ import annotations

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

from advml.presets import preset

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 600.0
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
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
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# Two epochs of everything, one scheme: prepare, pretrain, finetune, evaluate, represent, compare, transfer, report.
SMALL = (
    "grid.schemes=[SL]",
    "grid.standard_regimes=[]",
    "grid.adversarial_regimes=[AT]",
    *("data.max_train=64", "data.max_test=32", "attack.steps=1", "pretrain.SL.epochs=2", "regimes.AT.epochs=2"),
    *("worst_case.attacks=[]", "diagnostics.images=0", "corruptions.names=none", "similarity.batch_size=8"),
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment in which sbatch, squeue and scancel find a cluster of one node."""
    root = tmp_path_factory.mktemp("slurm")
    for parent in (root, *root.parents):  # munge insists that its socket's folders can be entered
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)
    for name in ("state", "spool"):
        (root / name).mkdir()
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    (root / "slurm.conf").write_text(
        CONFIGURATION.format(root=root, host=host, controller=free_port(), node=free_port(), cpus=psutil.cpu_count())
    )
    environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
    munge = [f"--{name}={root}/munge{end}" for name, end in (("key-file", ".key"), ("socket", ".socket"), ("log-file", ".log"))]
    daemons = (["munged", "--foreground", "--force", *munge, f"--pid-file={root}/munge.pid", f"--seed-file={root}/munge.seed"],)
    daemons += (["slurmctld", "-D"], ["slurmd", "-D"])
    running = []
    try:
        for command in daemons:
            path = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
            with (root / "daemons.log").open("ab") as log:
                running.append(subprocess.Popen([path, *command[1:]], env=environment, stdout=log, stderr=log))
            time.sleep(1)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def jobs(environment: dict[str, str]) -> set[str]:
    """Jobs that run."""
    told = subprocess.run(
        ["squeue", "--noheader", "--states=R", "--format=%i"], env=environment, capture_output=True, text=True, check=True
    )
    return set(told.stdout.split())


def study(root: Path) -> Path:
    """A copy of the main pipeline with small parameters."""
    root.mkdir()
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    (root / "src").symlink_to(REPOSITORY / "src")
    text = preset("digits", overrides=SMALL)
    (root / "params.yaml").write_text(text + "\ncluster: {cores: 1, memory: 2GB, walltime: '00:20:00'}\n")
    return root


def weights(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("models/*/*/model.safetensors")}


def test_a_study_on_slurm_survives_a_cancelled_job_and_gives_the_same_weights(tmp_path, slurm):
    environment = {**slurm, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "advml", "repro"]
    here = study(tmp_path / "here")
    subprocess.run([*command, "-j", "1"], cwd=here, env=environment, check=True, capture_output=True)

    there = study(tmp_path / "there")
    process = subprocess.Popen(
        [*command, "--cluster", "slurm", "-j", "1"], cwd=there, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (there / "models" / "pretrain" / "SL-at-s0").exists(), process)  # in the middle of the study
    first = jobs(environment)
    assert len(first) == 1
    subprocess.run(["scancel", *first], env=environment, check=True)
    wait_for(lambda: jobs(environment) - first, process)
    told, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, told + said
    assert weights(there) == weights(here) and len(weights(here)) == 2
    assert (there / "reports" / "report.html").exists()
    deadline = time.monotonic() + 30
    while jobs(environment):
        assert time.monotonic() < deadline, "jobs outlive the command"
        time.sleep(0.5)
