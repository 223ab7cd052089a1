"""`advml repro`: like `dvc repro`, but several stages at a time, on one machine or many, with progress bars.

Each stage whose inputs are ready runs as `dvc repro --single-item`, so DVC alone decides what is up to date, and records results.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, get_args

from advml.config import Cluster, Config
from advml.core.errors import Failure, UserError
from advml.core.exclusive import exclusive
from advml.core.io import read_json
from advml.core.messages import one_line, tell
from advml.core.paths import Workspace, pretraining_name
from advml.core.progress import Board
from advml.core.provenance import check_init
from advml.engine.cluster import Slots, connect
from advml.engine.fork_server import server
from advml.engine.stage_task import FOLDER, Outcome, last_line, run_stage, sent_environment, wait_for_stages
from advml.recipes import PhaseName

REMEDIES = {  # part of DVC's error message -> remedy
    "is not a git repository": "; run: git init, or, to work without git: dvc config --local core.no_scm true",
    "not inside of a DVC repository": "; create the study's files with: advml init",
    "RWLock-file": "; DVC was killed while it wrote this file: remove it",
}


def repro(root: Path, *, jobs: int, cluster: str | None = None, options: Cluster | None = None, reserve: bool = True) -> list[str]:
    """Bring the pipeline in `root` up to date; returns the stages that ran.

    Args:
        jobs: number of stages at a time.
        cluster: see `advml.engine.cluster.connect`.
        options: the section `cluster` of params.yaml.
        reserve: whether every stage gets a GPU of its own, if there are any.
    Raises:
        UserError: the folder has no pipeline, dvc.yaml is not valid, the cluster cannot be used, or another command runs this study.
        Failure: a stage failed; raised after the stages that were running have finished, so that their work is kept.
    """
    plan = _ask(root, "plan")
    if not plan:
        return []
    with (
        exclusive(root / FOLDER / "repro", work=f"advml repro is at work in {root.resolve()}"),
        connect(cluster, root=root, jobs=jobs, options=options or Cluster()) as slots,
        server(root) if cluster is None else contextlib.nullcontext({}) as environment,
        Board(total=len(plan), folder=root / FOLDER) as board,
    ):
        environment = environment | sent_environment(remark=cluster is not None)
        ended = _run(plan, slots, board, root=str(root.resolve()), token=slots.token, environment=environment, reserve=reserve)
    for note in dict.fromkeys(note for outcome in ended.values() for note in outcome.notes):
        tell(note)  # it would otherwise stay in the stage's log
    for name, outcome in ended.items():
        if outcome.failure:
            raise Failure(f"stage {name} failed: {outcome.failure}; fix the cause and repeat the command, which goes on from here")
    return [name for name, outcome in ended.items() if outcome.ran]


def check_starting_points(configuration: Config, workspace: Workspace) -> None:
    """Check every pretraining that has started from the weights of `model.init`; see `advml.core.provenance.check_init`."""
    for seed, scheme, phase in product(configuration.seeds, configuration.grid.schemes, get_args(PhaseName)):
        made = workspace.pretrained(pretraining_name(scheme, phase, seed)) / "model.json"
        record = read_json(made, remedy="restore it with: dvc checkout") if configuration.model.init and made.exists() else {}
        if record.get("init") and record["parameters"]["model"]["init"] == configuration.model.init:
            check_init(configuration.model.init, record)


def reasons(root: Path) -> dict[str, list[str]]:
    """Stages that `repro` would run, in order, each with its changed inputs, or with the stages that must run before it.

    Raises:
        UserError: the folder has no pipeline, or dvc.yaml is not valid.
    """
    plan, changed = _ask(root, "plan"), _ask(root, "changes")
    return {name: changed.get(name) or [f"after {', '.join(one for one in needs if one in changed)}"] for name, needs in plan.items()}


def _run(plan: dict[str, list[str]], slots: Slots, board: Board, **settings: Any) -> dict[str, Outcome]:
    """Run the stages of the plan, as many at a time as there are slots; after a failure, start no more and wait for running ones."""
    waiting, running, ended = list(plan), {}, {}
    try:
        while running or waiting:
            unfinished, free = {*waiting, *running}, max(0, slots.count() - len(running))
            for name in [name for name in waiting if unfinished.isdisjoint(plan[name])][:free]:
                waiting.remove(name)
                running[name] = slots.client.submit(run_stage, name, **settings, key=f"{name}-{time.time_ns()}")
            time.sleep(0.1)
            for name, future in list(running.items()):
                board.show(name)
                if not future.done():
                    continue
                del running[name]
                try:
                    ended[name] = future.result()
                except Exception as error:  # e.g. too many workers were lost, or a worker cannot read the folder or has a full disk
                    ended[name] = Outcome(one_line(error))
                board.finish(name, ok=not ended[name].failure)
                if ended[name].failure:
                    waiting.clear()
    finally:
        slots.client.cancel(list(running.values()))
        slots.client.run(wait_for_stages, on_error="ignore")
    return ended


def _ask(root: Path, what: str) -> dict[str, list[str]]:
    """Result of a function of `advml.engine.dvc_process`, which runs in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "advml.engine.dvc_process", what], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise Failure("DVC was killed; repeat the command, which goes on from here")
    if done.returncode:
        reason = last_line(done.stderr)
        raise UserError(f"dvc: {reason}{''.join(remedy for words, remedy in REMEDIES.items() if words in reason)}")
    return json.loads(done.stdout)
