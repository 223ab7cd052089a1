"""One stage as a task of a Dask worker: `dvc repro --single-item NAME` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from advml.core.errors import Failure
from advml.core.messages import tell
from advml.core.passwords import masked
from advml.core.processes import PARENT
from advml.core.progress import BOARD
from advml.core.provenance import source_digest
from advml.engine.devices import one_device

FOLDER = Path(".scratch") / "repro"  # in the study: logs and progress of stages
GRACE = 15.0  # seconds for a stage to end its MLflow run after SIGTERM
# DVC's words for a command that a signal has ended (137 and 143: through a shell), and ours.
KILLED = re.compile(r"exited with (-9|137|-15|143)\b|process killed")
MOST_KILLED = 3  # times that a stage which is killed is started: mostly for want of memory, and then it will be killed again
MOST_BLOCKED = 11  # times that a stage is started while a process of a lost worker still holds its files
PAUSE = 1.0  # seconds before that
SENT = ("MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")  # variables of the driver that replace those of workers
_at_work: set[int] = set()  # processes of this worker


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        failure: the line that says why, or None.
        ran: whether DVC ran its command, which else was found up to date.
        notes: notes and warnings of the stage.
    """

    failure: str | None
    ran: bool = False
    notes: tuple[str, ...] = ()


def sent_environment(*, remark: bool = False) -> dict[str, str]:
    """Variables of this process for those on workers; none with a password, which Dask does not hide.

    Args:
        remark: whether to say which one is left out.
    """
    found = {name: os.environ[name] for name in SENT if name in os.environ}
    sent = {name: value for name, value in found.items() if masked(value) == value}
    for name in found.keys() - sent.keys() if remark else ():
        tell(f"note: {name} holds a password and is not sent to the workers of the cluster; set it in their environment as well")
    return sent


def run_stage(name: str, *, root: str, token: str, environment: dict[str, str], reserve: bool) -> Outcome:
    """Bring one stage up to date. Its output goes to a log file, its progress to another one.

    Args:
        token: names the driver's token file, which shows that this machine sees the study's folder.
        environment: variables for the stage, beside those of this worker. Without OMP_NUM_THREADS, a stage gets its share of the cores.
        reserve: whether the stage gets a GPU of its own, where there are any.
    Raises:
        Failure: this machine does not see the folder, or has other sources of advml than the driver.
    """
    require_shared(root, token)
    log = Path(root, FOLDER, f"{name}.log")
    for attempt in itertools.count(1):
        with one_device() if reserve else contextlib.nullcontext({}) as device:
            code = _run_dvc(name, root=root, log=log, environment=device | environment)
        output = log.read_text(encoding="utf-8", errors="replace")
        attempts = MOST_BLOCKED if "tmp/rwlock" in output else MOST_KILLED if code < 0 or KILLED.search(output) else 1
        if code == 0 or attempt >= attempts or is_cancelled():
            break
        time.sleep(PAUSE)
    lines = [line for line in output.splitlines() if line.strip()]
    said = [line.removeprefix("advml: ") for line in lines if line.startswith("advml: ")]
    why = "DVC was killed" if code < 0 else said[-1] if said else last_line(output)
    ran = any("Running stage '" in line for line in lines)
    notes = tuple(line for line in lines if line.startswith(("note: ", "warning: ")))
    return Outcome(f"{why} (whole output: {log})" if code else None, ran, notes)


def last_line(output: str) -> str:
    """Where DVC says what went wrong."""
    return next((line.removeprefix("ERROR: ") for line in reversed(output.splitlines()) if line.strip()), "no output")


def _run_dvc(name: str, *, root: str, log: Path, environment: dict[str, str]) -> int:
    """Run one stage in a session of its own; returns DVC's exit code."""
    from dask.system import CPU_COUNT
    from distributed.worker import get_worker

    progress = log.with_suffix(".progress").resolve()
    settings = {
        "OMP_NUM_THREADS": str(max(1, CPU_COUNT // get_worker().state.nthreads)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # stages say `python`: this one
        BOARD: str(progress),
        PARENT: str(os.getpid()),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "advml.engine.dvc_process", "run", name],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that one signal reaches DVC, its shell and the stage
            env=os.environ | settings | environment,
        )
    _at_work.add(process.pid)
    try:
        while process.poll() is None and not is_cancelled():
            time.sleep(0.1)
    finally:
        _end(process)
        _at_work.discard(process.pid)
        progress.unlink(missing_ok=True)
    return process.returncode


async def wait_for_stages() -> None:
    """Return when this worker runs no stage any more."""
    while _at_work:
        await asyncio.sleep(0.05)


def token_file(root: str | Path, token: str) -> Path:
    """A file that shows workers the study's folder, as long as the driver lives. It holds the digest of the sources that they need."""
    return Path(root, FOLDER, f"token-{token}")


def require_shared(root: str, token: str) -> None:
    """Raises Failure if this machine does not see the study's folder and the driver's token file in it, or has other sources of advml."""
    host = os.uname().nodename
    try:
        wanted = token_file(root, token).read_text()
    except FileNotFoundError:
        raise Failure(f"{host} does not see {root}: all workers need the study's folder under this path (NFS, Lustre, ...)") from None
    if wanted and wanted != source_digest.__wrapped__():  # as they are now: a stage imports them anew
        where = Path(__file__).parents[1]
        raise Failure(f"{host} has other sources of advml ({where}) than this command had at its start; make them the same and repeat it")


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
