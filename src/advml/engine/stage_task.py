"""Run one stage as a task of a Dask worker: `dvc repro --single-item NAME` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from advml.core.errors import Failure
from advml.core.messages import tell
from advml.core.passwords import masked
from advml.core.processes import PARENT, end_session
from advml.core.progress import BOARD
from advml.core.provenance import source_digest
from advml.engine.devices import one_device

FOLDER = Path(".scratch") / "repro"  # in the study: logs and progress of stages
GRACE = 15.0  # seconds for a stage to end its MLflow run after SIGTERM
# Messages of DVC (137 and 143: through a shell) and of advml about a command that a signal has ended.
KILLED = re.compile(r"exited with (-9|137|-15|143)\b|process killed")
MOST_KILLED = 3  # starts of a stage that gets killed; few, because out of memory is the usual cause and will recur
MOST_BLOCKED = 11  # starts of a stage while a process of a lost worker still holds its files
PAUSE = 1.0  # seconds between two starts
SENT = ("MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")  # environment variables of the driver that replace those of workers
_at_work: set[int] = set()  # ids of the DVC processes that this worker has started and that still run


@dataclass(frozen=True)
class Outcome:
    """Result of a stage's task.

    Attributes:
        failure: one line with the reason; None: success.
        ran: whether DVC ran the stage's command; False: it was up to date.
        notes: lines of the stage's output that start with "note: " or "warning: ".
    """

    failure: str | None
    ran: bool = False
    notes: tuple[str, ...] = ()


def sent_environment(*, remark: bool = False) -> dict[str, str]:
    """Environment variables that the driver sends to workers; none that hold a password, because Dask shows them in plain text.

    Args:
        remark: print a note for each variable that is left out.
    """
    found = {name: os.environ[name] for name in SENT if name in os.environ}
    sent = {name: value for name, value in found.items() if masked(value) == value}
    for name in found.keys() - sent.keys() if remark else ():
        tell(f"note: {name} holds a password and is not sent to the workers of the cluster; set it in their environment as well")
    return sent


def run_stage(name: str, *, root: str, token: str, environment: dict[str, str], reserve: bool) -> Outcome:
    """Bring one stage up to date; its output goes to a log file, its progress to a file beside it.

    Args:
        name: of the stage.
        root: the study's folder.
        token: part of the name of the driver's token file; see `token_file`.
        environment: variables added to those of this worker. Without OMP_NUM_THREADS, a stage gets its share of the cores.
        reserve: whether the stage gets a GPU of its own, if the machine has any.
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
    """Last line of DVC's output that is not empty, where DVC states the error."""
    return next((line.removeprefix("ERROR: ") for line in reversed(output.splitlines()) if line.strip()), "no output")


def _run_dvc(name: str, *, root: str, log: Path, environment: dict[str, str]) -> int:
    """Run one stage in a process session of its own; returns DVC's exit code."""
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
        end_session(process, grace=GRACE)
        _at_work.discard(process.pid)
        progress.unlink(missing_ok=True)
    return process.returncode


async def wait_for_stages() -> None:
    """Wait until this worker runs no stage."""
    while _at_work:
        await asyncio.sleep(0.05)


def token_file(root: str | Path, token: str) -> Path:
    """Path of the driver's token file, which holds the digest of the driver's sources.

    A worker that can read it shares the study's folder with the driver, which removes it at its end.
    """
    return Path(root, FOLDER, f"token-{token}")


def require_shared(root: str, token: str) -> None:
    """Raise Failure if this machine cannot read the driver's token file in the study's folder, or has other sources of advml."""
    host = os.uname().nodename
    try:
        wanted = token_file(root, token).read_text()
    except FileNotFoundError:
        raise Failure(f"{host} does not see {root}: all workers need the study's folder under this path (NFS, Lustre, ...)") from None
    if wanted and wanted != source_digest.__wrapped__():  # not the cached digest: a stage imports the sources as they are now
        where = Path(__file__).parents[1]
        raise Failure(f"{host} has other sources of advml ({where}) than this command had at its start; make them the same and repeat it")


def is_cancelled() -> bool:
    """Whether the task of this thread was cancelled: the driver was interrupted, or driver or scheduler have died."""
    from distributed import Status
    from distributed.worker import get_worker, thread_state

    state = get_worker().state.tasks.get(thread_state.key)
    return state is None or state.state == "cancelled" or get_worker().status != Status.running
