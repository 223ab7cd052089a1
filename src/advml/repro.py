"""`advml repro`: what `dvc repro` does, several stages at a time, on one machine or many, with one board of progress bars.

Every stage whose inputs are ready runs as its own `dvc repro --single-item`, so DVC alone decides what is up to date and records results.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from advml.config import Cluster
from advml.engine import stage_task
from advml.engine.cluster import Slots, connect
from advml.engine.exclusive import exclusive
from advml.engine.fork_server import server
from advml.errors import Failure, UserError
from advml.lines import tell
from advml.progress import Board

if TYPE_CHECKING:
    from distributed import Future

# DVC's words for a command that a signal has ended (137 and 143: through a shell), and ours.
KILLED = re.compile(r"exited with (-9|137|-15|143)\b|process killed")
MOST_RETRIES = 10  # of a stage whose worker is lost
MOST_KILLS = 2  # of a stage that is itself killed: mostly for want of memory, and then it will be again


@dataclass
class Running:
    """A stage that has been submitted."""

    future: Future
    log: Path
    progress: Path
    started: float


def repro(root: Path, *, jobs: int, cluster: str | None = None, options: Cluster | None = None, reserve: bool = True) -> list[str]:
    """Bring the pipeline in `root` up to date; returns the stages that ran.

    Args:
        jobs: stages at a time.
        cluster: see `advml.engine.cluster.connect`.
        options: the section `cluster` of params.yaml.
        reserve: whether every stage gets a GPU of its own, where there are any.
    Raises:
        UserError: there is no pipeline here, dvc.yaml is wrong, the cluster cannot be used, or another command runs this study.
        Failure: a stage failed; those already running are finished first, so that their work is kept.
    """
    upstream, waiting = _plan(root)
    if not waiting:
        return []
    place = connect(cluster, root=root, jobs=jobs, options=options or Cluster())
    with (
        exclusive(root / stage_task.FOLDER / "repro", work=f"advml repro is at work in {root.resolve()}"),
        place as slots,
        server(root) if cluster is None else contextlib.nullcontext({}) as found,
        Board(total=len(waiting)) as board,
    ):
        environment = found | {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        schedule = Schedule(root, slots, environment, reserve, board, upstream, waiting)
        try:
            while schedule.is_unfinished():
                schedule.start_ready()
                time.sleep(0.1)
                schedule.take_finished()
        finally:
            slots.client.cancel([job.future for job in schedule.running.values()])
            slots.client.run(stage_task.wait_for_stages, on_error="ignore")
    for note in schedule.notes:  # what a stage has said to be read would otherwise stay in its log
        tell(note)
    if schedule.failed:
        name, why = schedule.failed[0]
        raise Failure(f"stage {name} failed: {why}; after mending, the same command goes on")
    return schedule.ran


@dataclass
class Schedule:
    """Which stages wait, run, have run and have failed."""

    root: Path
    slots: Slots
    environment: dict[str, str]
    reserve: bool
    board: Board
    upstream: dict[str, set[str]]
    waiting: list[str]
    running: dict[str, Running] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)
    ran: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    announced: bool = False

    def is_unfinished(self) -> bool:
        """Whether to go on: after a failure, only until the stages at work have ended."""
        return bool(self.running or (self.waiting and not self.failed))

    def start_ready(self) -> None:
        """Submit stages whose inputs are ready, as many as there are free slots."""
        count = self.slots.count()
        if not count and not self.announced:
            self.announced = True
            tell("waiting for a worker of the cluster")
        pending = {*self.waiting, *self.running}
        ready = [] if self.failed else [name for name in self.waiting if not self.upstream[name] & pending]
        for name in ready[: max(0, count - len(self.running))]:
            self.waiting.remove(name)
            self.running[name] = _submit(self.slots, self.root, name, environment=self.environment, reserve=self.reserve)

    def take_finished(self) -> None:
        """Show progress; note what has ended; queue again what was killed."""
        for name, job in list(self.running.items()):
            self.board.show(name, _read(job.progress))
            if not job.future.done():
                continue
            del self.running[name]
            job.progress.unlink(missing_ok=True)
            ok, reason, retries = _outcome(job)
            if not ok and self.retries[name] < retries:
                self.retries[name] += 1
                self.waiting.insert(0, name)
                continue
            lines = _output(job.log).splitlines()
            self.ran += [name] if any("Running stage '" in line for line in lines) else []  # else DVC found it unchanged, or made before
            self.notes += [line for line in lines if line.startswith("note: ")]
            self.board.finish(name, ok=ok, seconds=time.monotonic() - job.started)
            self.failed += [] if ok else [(name, f"{reason} (whole output: {job.log})")]


def _submit(slots: Slots, root: Path, name: str, *, environment: dict[str, str], reserve: bool) -> Running:
    folder = root / stage_task.FOLDER
    log = folder / f"{name}.log"
    log.write_bytes(b"")
    future = slots.client.submit(
        stage_task.run_stage,
        name,
        root=str(root.resolve()),
        token=slots.token,
        environment=environment,
        reserve=reserve,
        key=f"{name}-{time.time_ns()}",
        pure=False,
    )
    return Running(future, log, folder / f"{name}.progress", time.monotonic())


def _outcome(job: Running) -> tuple[bool, str, int]:
    """Whether a stage ended well, why not, and how often it may run again after such an end."""
    if job.future.status == "finished":
        code, output = job.future.result(), _output(job.log)
        if "tmp/rwlock" in output:  # a process of a lost worker is still ending
            return code == 0, _reason(job.log), MOST_RETRIES
        killed = code < 0 or (code and KILLED.search(output))
        return code == 0, "DVC was killed" if code < 0 else _reason(job.log), MOST_KILLS if killed else 0
    error = job.future.exception() if job.future.status == "error" else None
    if error is None or type(error).__name__ == "KilledWorker":
        return False, f"{MOST_RETRIES} of its workers were lost", MOST_RETRIES
    return False, " ".join(str(error).split()), 0


def _plan(root: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Stage -> the stages it needs, directly or not; and the stages that DVC finds changed, with everything behind them, in order."""
    done = subprocess.run(
        [sys.executable, "-m", "advml.engine.dvc_graph"], cwd=root, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = _last_line(done.stderr)
        remedy = (
            "; say: git init, or, to do without git: dvc config --local core.no_scm true" if "is not a git repository" in reason else ""
        )
        raise UserError(f"dvc: {reason}{remedy}")
    told = json.loads(done.stdout)
    direct, changed = told["needs"], set(told["changed"])

    def all_before(name: str) -> set[str]:
        return set(direct[name]).union(*(all_before(one) for one in direct[name]))

    upstream = {name: all_before(name) for name in told["stages"]}
    return upstream, [name for name, before in upstream.items() if name in changed or before & changed]


def _environment() -> dict[str, str]:
    """Of a process that is to run these sources."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _read(progress: Path) -> dict[str, object]:
    try:
        return json.loads(progress.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _output(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _reason(log: Path) -> str:
    """The one line that advml printed, or DVC's last line."""
    lines = [line for line in _output(log).splitlines() if line.strip()]
    said = [line.removeprefix("advml: ") for line in lines if line.startswith("advml: ")]
    return said[-1] if said else _last_line("\n".join(lines))


def _last_line(text: str) -> str:
    return next((line.removeprefix("ERROR: ") for line in reversed(text.strip().splitlines()) if line.strip()), "no output")
