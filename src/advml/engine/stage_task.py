"""One stage as a task of a Dask worker: `dvc repro --single-item NAME` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from advml.engine.devices import one_device
from advml.engine.parent import PARENT
from advml.errors import Failure
from advml.progress import BOARD

FOLDER = Path(".scratch") / "repro"  # in the study: logs and progress of stages
GRACE = 15.0  # seconds for a stage to end its MLflow run after SIGTERM
_at_work: set[int] = set()  # processes of this worker


def run_stage(name: str, *, root: str, token: str, environment: dict[str, str], reserve: bool) -> int:
    """Bring one stage up to date; returns DVC's exit code. Its output goes to a log file, its progress to another one.

    Args:
        token: names the driver's token file, which shows that this machine sees the study's folder.
        environment: variables for the stage, beside those of this worker. Without OMP_NUM_THREADS, a stage gets its share of the cores.
        reserve: whether the stage gets a GPU of its own, where there are any.
    Raises:
        Failure: this machine does not see the folder.
    """
    from dask.system import CPU_COUNT
    from distributed.worker import get_worker

    require_shared(root, token)
    folder = Path(root, FOLDER)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # stages say `python`: this one
    share = max(1, CPU_COUNT // get_worker().state.nthreads)
    with one_device() if reserve else contextlib.nullcontext({}) as device, (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that one signal reaches DVC, its shell and the stage
            env=os.environ
            | {"OMP_NUM_THREADS": str(share), "PATH": path, BOARD: str(folder.resolve() / f"{name}.progress"), PARENT: str(os.getpid())}
            | device
            | environment,
        )
        _at_work.add(process.pid)
        try:
            while process.poll() is None:
                if is_cancelled():
                    _end(process)
                time.sleep(0.1)
        finally:
            _end(process)
            _at_work.discard(process.pid)
    return process.returncode


async def wait_for_stages() -> None:
    """Return when this worker runs no stage any more."""
    while _at_work:
        await asyncio.sleep(0.05)


def token_file(root: str | Path, token: str) -> Path:
    """An empty file that shows workers the study's folder, as long as the driver lives."""
    return Path(root, FOLDER, f"token-{token}")


def require_shared(root: str, token: str) -> None:
    """Raises Failure if this machine does not see the study's folder, with the token file that the driver has made there."""
    if token_file(root, token).exists():
        return
    raise Failure(f"{os.uname().nodename} does not see {root}: all workers need the study's folder under this path (NFS, Lustre, ...)")


def is_cancelled() -> bool:
    """Whether the task that this thread runs was withdrawn: the driver was interrupted or has died, or the scheduler has."""
    from distributed import Status
    from distributed.worker import get_worker, thread_state

    state = get_worker().state.tasks.get(thread_state.key)
    return state is None or state.state == "cancelled" or get_worker().status != Status.running


def _end(process: subprocess.Popen[bytes]) -> None:
    """End DVC, its shell and the stage, and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        while _is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the stage's session still works: zombies do not, which may stay where nothing waits for orphans."""
    process.poll()
    for member in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if member.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(member.pid) == process.pid:
                return True
    return False
