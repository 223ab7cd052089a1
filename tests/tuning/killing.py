"""The command as a process of its own, on a toy, and what must hold after it and its processes were killed."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
from toy_search import Toy

from advml.tuning import study as studies
from advml.tuning.storage import close, connect

DRIVER = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
from toy_search import Toy, main
from advml.core.errors import UserError
try:
    main(Toy(Path("log").resolve(), pause={pause}), Path().resolve(), trials={trials}, slots=2, storage={storage!r}, cluster={cluster!r})
except UserError as error:
    sys.exit(str(error))
"""


def start(root: Path, *, pause: float, trials: int = 40, storage: str | None = None, cluster: str | None = None) -> subprocess.Popen[str]:
    """The command in the study's folder; a trial takes three times `pause` seconds."""
    here = str(Path(__file__).parent)
    code = DRIVER.format(here=here, pause=pause, trials=trials, storage=storage, cluster=cluster)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": here}, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def at_work(toy: Toy) -> list[psutil.Process]:
    """Processes that have begun a trial and live; one that ends meanwhile is left out."""
    pids = {int(line.split()[1]) for line in toy.log.read_text().splitlines()} if toy.log.exists() else set()
    living = [process for process in psutil.process_iter(["status"]) if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in living if process.pid in pids]


def survives(toy: Toy, driver: Callable[..., subprocess.Popen], url: str, *, trials: int, kills: int, drivers: int) -> None:
    """Runs a study whose processes are killed at random, and whose driver is; nothing is lost, and nothing is done twice.

    Args:
        kills: of processes under each driver.
        drivers: that are killed.
    """
    numbers = random.Random(0)
    for round_number in range(drivers + 1):
        process, killed = driver(pause=0.03, trials=trials, storage=url), 0
        while process.poll() is None and killed < kills:
            time.sleep(0.2)
            if processes := at_work(toy):
                with contextlib.suppress(psutil.NoSuchProcess):
                    numbers.choice(processes).kill()
                    killed += 1
        if round_number < drivers:
            process.kill()
        said = process.communicate(timeout=600)[1]
        assert round_number < drivers or process.returncode == 0, said
    study = optuna.load_study(study_name="toy", storage=connect(url))
    found = study.get_trials()
    close(study)
    finished = studies.finished(found)
    assert len(finished) == trials and {trial.state.name for trial in finished} == {"COMPLETE"}
    assert {trial.state.name for trial in found} == {"COMPLETE", "FAIL"}  # none RUNNING, none WAITING
    assert max(Counter(str(trial.params) for trial in finished).values()) == 1
    for trial in found:  # parameters of a killed trial are tried again, by one trial and no more
        again = [other for other in found if other.user_attrs.get(studies.RETRY_OF) == trial.number]
        about = [(one.number, one.state.name, one.params, one.user_attrs, one.datetime_start) for one in (trial, *again)]
        assert len(again) == studies.is_killed(trial) and all(other.params.items() >= trial.params.items() for other in again), about
