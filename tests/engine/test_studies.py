"""Whole studies on a cluster whose processes are killed in the middle: they end with the weights of a study that nothing disturbs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]
TRAINING = ("check", "prepare", "pretrain_at", "finetune_at")
TIMEOUT = 900.0
KILLS = int(os.environ.get("ADVML_KILLS", "3"))
KINDS = ("worker", "stage", "host", "driver")
yaml = YAML()  # keeps the order of keys, from which DVC names stages


def wait_for(condition: Callable[[], object], *, alive: subprocess.Popen | None = None) -> None:
    """Return when the condition holds; `alive` is a process that must not end before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert alive is None or alive.poll() is None, alive.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_study(root: Path, **sections: object) -> Path:
    """The smoke pipeline in a folder of its own, but for what comes after the training of AT. ADVML_KILLS above 3: all of it."""
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (root / "src").symlink_to(REPOSITORY / "src")
    stages = yaml.load(REPOSITORY / "dvc.yaml")["stages"]
    params = yaml.load(REPOSITORY / "pipelines" / "smoke" / "params.yaml") | sections
    if KILLS <= 3:
        params["grid"]["adversarial_regimes"] = ["AT"]
    with (root / "dvc.yaml").open("w") as file:
        yaml.dump({"stages": {name: stage for name, stage in stages.items() if name in TRAINING or KILLS > 3}}, file)
    with (root / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return root


def advml_repro(root: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "advml", "repro", *options],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(root: Path) -> dict[str, str]:
    """Digests of all weights."""
    files = root.glob("models/*/*/model.safetensors")
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def command(process: psutil.Process) -> str:
    """Its words; nothing when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def at_work(root: Path) -> list[psutil.Process]:
    """Processes in this folder: drivers, DVC, its shells and stages."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and process.info["cwd"] == str(root):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The study after an `advml repro` on this machine."""
    root = make_study(tmp_path_factory.mktemp("undisturbed") / "study")
    process = advml_repro(root, "-j", "2")
    told = process.communicate()
    assert process.returncode == 0 and len(weights(root)) >= 4, told
    return root


@pytest.mark.cluster
def test_a_study_on_two_hosts_whose_processes_are_killed_at_random_moments(tmp_path, scheduler, start, undisturbed):
    """ADVML_KILLS=10 pytest -m cluster -s: ten kills, in the whole smoke pipeline."""
    root, moments, told = make_study(tmp_path / "study"), random.Random(KILLS), []

    def start_host(name: str) -> psutil.Process:
        (folder := tmp_path / name).mkdir(exist_ok=True)
        return psutil.Process(start("worker", scheduler, "--nthreads", "1", "--local-directory", str(folder), TMPDIR=str(folder)).pid)

    def stages() -> list[psutil.Process]:
        """DVC, its shells and what they run, of stages on either host; those of the driver read the pipeline."""
        ours = {child.pid for child in psutil.Process(driver.pid).children(recursive=True)} if driver.poll() is None else set()
        return [process for process in at_work(root) if process.pid not in {driver.pid, *ours}]

    def victims(kind: str, host: psutil.Process) -> list[psutil.Process]:
        family = host.children(recursive=True)
        if kind == "host":
            return [*family, host]
        if kind == "worker":  # its nanny starts another one
            return [process for process in family if "spawn_main" in command(process)]
        if kind == "stage":
            return moments.sample(found := stages(), min(1, len(found)))
        return [psutil.Process(driver.pid)] if driver.poll() is None else []

    hosts = {name: start_host(name) for name in ("one", "two")}
    driver, begun, kinds = advml_repro(root, "--cluster", scheduler), time.monotonic(), moments.sample([*KINDS] * KILLS, KILLS)
    for kind, done in zip(kinds, sorted(moments.choices(range(len(recorded(undisturbed)) - 1), k=KILLS)), strict=True):
        while driver.poll() or len(recorded(root)) < done or not stages():
            if driver.poll():  # a stage that is killed three times ends the command; the same one goes on
                told.append(driver.communicate())
                driver = advml_repro(root, "--cluster", scheduler)
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 5))
        name = moments.choice(sorted(hosts))
        for victim in victims(kind, hosts[name]):
            with contextlib.suppress(psutil.NoSuchProcess):
                print(f"{time.monotonic() - begun:.0f} s: {kind}", command(victim)[-70:], flush=True)
                victim.kill()
        if kind == "host":
            hosts[name] = start_host(name)
        if kind == "driver":
            told.append(driver.communicate())
            driver = advml_repro(root, "--cluster", scheduler)
    told.append(driver.communicate(timeout=TIMEOUT))
    print(f"{time.monotonic() - begun:.0f} s", *told[-1])
    assert driver.returncode == 0, told
    assert weights(root) == weights(undisturbed)
    assert at_work(root) == []
    assert not list(root.glob("**/*.part")) and recorded(root) == recorded(undisturbed)


def recorded(root: Path) -> dict[str, dict[str, str]]:
    """What dvc.lock says of each stage: the digests of its outputs."""
    stages = yaml.load(root / "dvc.lock")["stages"] if (root / "dvc.lock").exists() else {}
    return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}


@pytest.mark.slurm
def test_a_study_on_slurm_whose_job_is_cancelled_in_the_middle_of_a_stage(tmp_path, slurm, undisturbed):
    root = make_study(tmp_path / "study", cluster={"cores": 1, "memory": "2GB", "walltime": "00:20:00"})
    settings = slurm | {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "1s"}
    process = advml_repro(root, "--cluster", "slurm", "-j", "2", **settings)
    wait_for(lambda: list(root.glob(".scratch/*-[SC]L-*")) and len(jobs(slurm)) == 2, alive=process)  # a training is at work
    first = jobs(slurm)
    subprocess.run(["scancel", min(first)], env=os.environ | slurm, check=True)
    wait_for(lambda: jobs(slurm) - first, alive=process)
    told = process.communicate(timeout=TIMEOUT)
    print(*told, sorted(first), sorted(jobs(slurm)))
    assert process.returncode == 0, told
    assert weights(root) == weights(undisturbed)
    wait_for(lambda: not jobs(slurm) and not at_work(root))


@pytest.mark.slurm
def test_a_job_that_slurm_refuses_ends_the_command_with_one_line(tmp_path, slurm):
    root = make_study(tmp_path / "study", cluster={"memory": "900GB"})
    process = advml_repro(root, "--cluster", "slurm", **slurm)
    _, told = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2 and "cluster" in told and "sbatch" in told and told.count("\n") == 1


def jobs(slurm: dict[str, str]) -> set[str]:
    """Jobs that run."""
    command = ["squeue", "--noheader", "--states=R", "--format=%i"]
    return set(subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True, check=True).stdout.split())
