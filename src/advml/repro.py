"""`advml repro`: what `dvc repro` does, several stages at a time, with one board of progress bars.

DVC runs one stage after another; small networks leave most cores idle. Here every stage whose inputs are
ready runs as its own `dvc repro --single-item`, so DVC alone decides what is up to date and records results.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from advml.errors import Failure, UserError
from advml.progress import BOARD, Board
from advml.warm import server


@dataclass
class Running:
    """A stage at work; its output goes to `log`, its progress to `progress`."""

    process: subprocess.Popen[bytes]
    log: Path
    progress: Path
    started: float


def repro(root: Path, *, jobs: int) -> list[str]:
    """Bring the pipeline in `root` up to date; returns the stages that ran.

    Raises:
        UserError: there is no pipeline here, or dvc.yaml is wrong.
        Failure: a stage failed; those already running are finished first, so that their work is kept.
    """
    upstream, waiting = _plan(root)
    running: dict[str, Running] = {}
    ran: list[str] = []
    failed: list[tuple[str, Path]] = []
    notes: list[str] = []
    with server(root) if waiting else contextlib.nullcontext({}) as warm, Board(total=len(waiting)) as board:
        try:
            while running or (waiting and not failed):
                ready = [name for name in waiting if not upstream[name] & (set(waiting) | set(running))]
                for name in [] if failed else ready[: jobs - len(running)]:
                    waiting.remove(name)
                    running[name] = _start(root, name, warm)
                time.sleep(0.1)
                for name, job in list(running.items()):
                    board.show(name, _read(job.progress))
                    if job.process.poll() is not None:
                        del running[name]
                        ran += [name] if "Running stage '" in _output(job.log) else []  # else DVC found it unchanged, or made before
                        board.finish(name, ok=job.process.returncode == 0, seconds=time.monotonic() - job.started)
                        notes += [line for line in _output(job.log).splitlines() if line.startswith("note: ")]
                        job.progress.unlink(missing_ok=True)
                        failed += [(name, job.log)] if job.process.returncode else []
        finally:
            for job in running.values():
                _terminate(job.process)
    for note in notes:  # what a stage has said to be read would otherwise stay in its log
        print(note, file=sys.stderr, flush=True)
    if failed:
        name, log = failed[0]
        raise Failure(f"stage {name} failed: {_reason(log)} (whole output: {log}); after mending, the same command goes on")
    return ran


def _plan(root: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Stage -> the stages it needs, directly or not; and the stages that DVC finds changed, with everything behind them, in order."""
    done = subprocess.run([sys.executable, "-m", "advml.plan"], cwd=root, env=_environment(), capture_output=True, text=True, check=False)
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


def _environment(**more: str) -> dict[str, str]:
    """Of a process that is to run these sources."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def _start(root: Path, name: str, environment: dict[str, str]) -> Running:
    folder = root / ".scratch" / "repro"
    folder.mkdir(parents=True, exist_ok=True)
    log, progress = folder / f"{name}.log", (folder / f"{name}.progress").resolve()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # stages say `python`: this one
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PATH": path, BOARD: str(progress)},
        )
    return Running(process, log, progress, time.monotonic())


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """End DVC and what it has started: DVC alone would leave the stage's command at work."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        psutil.wait_procs(family, timeout=10)  # for MLflow runs to be ended
    process.wait()


def _read(progress: Path) -> dict[str, object]:
    try:
        return json.loads(progress.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _output(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _reason(log: Path) -> str:
    """The one line that advml printed, or DVC's last word."""
    lines = [line for line in _output(log).splitlines() if line.strip()]
    said = [line.removeprefix("advml: ") for line in lines if line.startswith("advml: ")]
    return said[-1] if said else _last_line("\n".join(lines))


def _last_line(text: str) -> str:
    return next((line.removeprefix("ERROR: ") for line in reversed(text.strip().splitlines()) if line.strip()), "no output")
