"""`advml tune attack|finetune|pretrain`: one command from the empty study to the proposal, or from wherever the last one got to."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from advml import tracking
from advml.config import Config
from advml.errors import Failure
from advml.paths import Workspace, checked_name
from advml.tracking.signals import deferred
from advml.tuning import census, outputs, supervisor
from advml.tuning import study as studies
from advml.tuning.board import Board, show
from advml.tuning.storage import address
from advml.tuning.worker import Orders, Search, call_and_tell

# Attributes of the study: its run, the winner's measurements, and those that do not depend on the winner
RUN, CONFIRMED, MEASURED = "mlflow_run", "confirmed", "measured"


@dataclass(frozen=True)
class Outcome:
    """What a command leaves behind. `best` is None if no trial keeps the constraints."""

    name: str
    folder: Path
    finished: int
    best: FrozenTrial | None
    default: FrozenTrial | None
    confirmed: dict[str, Any] | None
    files: list[Path]


def tune(
    search: Search,
    config: Config,
    workspace: Workspace,
    *,
    storage: str | None,
    trials: int,
    workers: int,
    seed: int,
    replace: bool = False,
) -> Outcome:
    """Run the study until it has `trials` finished trials, of all commands together; then confirm the winner and write it all down.

    However it ends, by Ctrl-C too, the best so far is written to `reports/tune/<name>/` and the MLflow runs are ended.

    Args:
        search: what to search; checked.
        config: for the tracking.
        workspace: of reports and scratch folders.
        storage: URL of the studies' database; None: optuna.db in the workspace.
        trials: finished trials wanted.
        workers: processes on this machine.
        seed: of the samplers.
        replace: whether a study of this name that searched something else is thrown away.
    Raises:
        UserError: the storage or the study cannot be used.
        Failure: all trials fail, or all workers die.
    """
    checked_name(search.name)  # its folders are removed in the end
    url, definition = address(storage, root=workspace.root), search.definition()
    supervisor.processes()  # begins to import torch, beside what this process does
    study = studies.create(definition, url, replace=replace)
    studies.bury(study, url)
    everything = workspace.scratch(f"tune/{search.name}").resolve()
    scratch = everything / study.user_attrs.get(studies.IDENTITY, "first")  # trials of another study are numbered alike
    orders = Orders(search, url, trials, len(census.finished(study.get_trials(deepcopy=False))), seed, scratch)
    board = Board(search.name, metrics=search.metrics, directions=definition.directions, total=trials)
    with _tracked(search, config, workspace, study) as run:
        try:
            with board:
                supervisor.supervise(study, orders, workers=workers, watch=_both(board.show, lambda found: run.show(facts(search, found))))
            _confirm(search, study, definition.directions)
        except BaseException:
            so_far = _close(search, study, url, workspace, run)
            if so_far.best is not None:
                told = f"the best so far is trial {so_far.best.number}: {show(so_far.best.params)}; it stands in {so_far.folder}"
                print(f"{search.name}: {so_far.finished} of {trials} trials; {told}", file=sys.stderr, flush=True)
            raise
        outcome = _close(search, study, url, workspace, run)
    shutil.rmtree(everything, ignore_errors=True)
    return outcome


def _both(*watchers: Callable[[Sequence[FrozenTrial]], None]) -> Callable[[Sequence[FrozenTrial]], None]:
    def show(trials: Sequence[FrozenTrial]) -> None:
        with deferred():  # a Ctrl-C in the middle of a drawing or a transaction would leave half of it
            for watch in watchers:
                watch(trials)

    return show


@contextlib.contextmanager
def _tracked(search: Search, config: Config, workspace: Workspace, study: optuna.Study) -> Iterator[tracking.SearchRun]:
    """The study's MLflow run: begun, or taken up where an earlier command has left it."""
    begun = study.user_attrs.get(RUN)
    run = tracking.open_search(config, root=workspace.root, name=search.name, tags=search.tags(), params=search.parameters(), run_id=begun)
    if run.id and run.id != begun:
        study.set_user_attr(RUN, run.id)
    with run:
        yield run


def _confirm(search: Search, study: optuna.Study, directions: Sequence[str]) -> None:
    """Measure the winner once more, and what else was asked for, but nothing that the study has already: test images are looked at once."""
    best = outputs.best_of(study.get_trials(deepcopy=False), directions)
    if best is None:
        return
    known = study.user_attrs.get(CONFIRMED)
    if known is None or known["trial"] != best.number:
        found = in_a_process(search.confirm, best.params)
        study.set_user_attr(CONFIRMED, {"trial": best.number, "times": (known["times"] if known else 0) + 1, "of": found})
    for name in search.once:
        if name not in study.user_attrs.get(MEASURED, {}):
            study.set_user_attr(MEASURED, study.user_attrs.get(MEASURED, {}) | {name: in_a_process(search.measure, name)})


def _confirmed(study: optuna.Study, best: FrozenTrial | None) -> dict[str, Any] | None:
    """What this command or an earlier one has measured of this winner."""
    known = study.user_attrs.get(CONFIRMED)
    if best is None or known is None or known["trial"] != best.number:
        return None
    times = {"winners_confirmed": known["times"]} if known["times"] > 1 else {}
    return known["of"] | study.user_attrs.get(MEASURED, {}) | times


def _close(search: Search, study: optuna.Study, url: str, workspace: Workspace, run: tracking.SearchRun) -> Outcome:
    """Files, figures, and the run's last state."""
    trials, directions = study.get_trials(deepcopy=False), search.definition().directions
    best = outputs.best_of(trials, directions)
    confirmed = _confirmed(study, best)
    folder = workspace.reports / "tune" / search.name
    files = in_a_process(outputs.write, folder, search, study.study_name, url, confirmed)
    run.show(facts(search, trials))
    if best is not None:
        run.crown(best.number)
        run.log_metrics({f"best/{name}": value for name, value in outputs.scores(search.metrics, best).items()})
    for file in files:
        run.log_file(file, "tune")
    return Outcome(search.name, folder, len(census.finished(trials)), best, census.default_of(trials), confirmed, files)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it where torch and matplotlib are imported already, and not in this process, which stays small.

    However this ends, the other process does too.

    Raises:
        Failure: it was killed, or ended with an error, which it has printed.
    """
    context = supervisor.processes()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=call_and_tell, args=(theirs, function, *arguments), daemon=True)
    try:
        process.start()
        theirs.close()
        try:
            said, result = ours.recv()
        except EOFError:
            process.join()
            why = "ended with an error, which stands above" if process.exitcode == 1 else "was killed, perhaps for want of memory"
            raise Failure(f"the process that measures and writes {why}; the same command goes on") from None
    finally:
        ours.close()
        if process.pid is not None:
            process.terminate()
            process.join(10)
            process.kill()
            process.join()
    if said is not None:
        raise said(result)
    return result


def facts(search: Search, trials: Sequence[FrozenTrial]) -> list[tracking.Trial]:
    """Trials as the history knows them."""
    return [
        tracking.Trial(
            number=trial.number,
            state=outputs.state_of(trial),
            params=search.proposal(trial.params),
            metrics=outputs.scores(search.metrics, trial),
            history=trial.user_attrs.get("history", ()),
            reason=trial.user_attrs.get(census.REASON),
        )
        for trial in trials
        if outputs.state_of(trial) != "waiting" and census.PROCESS in trial.user_attrs
    ]
