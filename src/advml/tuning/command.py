"""`advml tune attack|finetune|pretrain`: one command from the empty study to the proposal, or from wherever the last one got to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from advml.config import Config
from advml.errors import Failure, UserError
from advml.lines import tell
from advml.passwords import masked
from advml.paths import Workspace, checked_name
from advml.tuning import census, confirmation, identity, outputs, supervisor
from advml.tuning import study as studies
from advml.tuning.board import Board, show
from advml.tuning.history import History
from advml.tuning.locking import lock
from advml.tuning.storage import address
from advml.tuning.turn import Turn
from advml.tuning.worker import Orders, Search, call_and_tell


@dataclass(frozen=True)
class Outcome:
    """What a command leaves behind. `best` is None if no trial keeps the constraints, or for the reason that `fruitless` gives."""

    name: str
    folder: Path
    finished: int
    best: FrozenTrial | None
    default: FrozenTrial | None
    confirmed: dict[str, Any] | None
    files: list[Path]
    fruitless: str | None = None


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
    _require_unclaimed(workspace.reports / "tune" / search.name, study, url, replace=replace)
    studies.bury(study, url)
    everything = workspace.scratch(f"tune/{search.name}").resolve()
    scratch = everything / study.user_attrs.get(identity.IDENTITY, "first")  # trials of another study are numbered alike
    orders = Orders(search, url, trials, len(census.finished(study.get_trials(deepcopy=False))), seed, scratch)
    board = Board(search.name, metrics=search.metrics, directions=definition.directions, total=trials)
    with History(search, config, workspace, study, url) as history:
        try:
            with board:
                supervisor.supervise(study, orders, workers=workers, watch=_both(board.show, history.show))
            confirmation.confirm(search, study, url, definition.directions, in_a_process)
        except BaseException:
            so_far = _close(search, study, url, workspace, history)
            if so_far.best is not None:
                told = f"the best so far is trial {so_far.best.number}: {show(so_far.best.params)}; it stands in {so_far.folder}"
                tell(f"{search.name}: {so_far.finished} of {trials} trials; {told}")
            raise
        outcome = _close(search, study, url, workspace, history)
    _tidy(study, url, everything)
    return outcome


def _require_unclaimed(folder: Path, study: optuna.Study, url: str, *, replace: bool) -> None:
    """Raises UserError if the folder holds the results of a search that this database knows nothing of: they would be written over."""
    if replace or census.finished(study.get_trials(deepcopy=False)) or not (folder / outputs.BEST).exists():
        return
    raise UserError(
        f"{folder} holds the results of a search of which {masked(url)} knows nothing; "
        f"give this one a name of its own: --name {study.study_name}-2, or let it write over them: --replace"
    )


def _both(*watchers: Callable[[Sequence[FrozenTrial]], None]) -> Callable[[Sequence[FrozenTrial]], None]:
    def show(trials: Sequence[FrozenTrial]) -> None:
        for watch in watchers:
            watch(trials)

    return show


def _close(search: Search, study: optuna.Study, url: str, workspace: Workspace, history: History) -> Outcome:
    """Files, figures, and the runs' last state."""
    trials, directions = study.get_trials(deepcopy=False), search.definition().directions
    best = outputs.best_of(trials, directions)
    found = confirmation.confirmed(study, best)
    folder = workspace.reports / "tune" / search.name
    files = in_a_process(outputs.write, folder, search, study.study_name, url, found)
    history.close(trials, best, files)
    default, reason = census.default_of(trials), outputs.fruitless(trials)
    return Outcome(search.name, folder, len(census.finished(trials)), best, default, found, files, reason)


def _tidy(study: optuna.Study, url: str, scratch: Path) -> None:
    """Remove the scratch folders, unless another command is at work in them, or will be: it tidies up itself."""
    turn = Turn(study, url, "confirm")
    if turn.take():
        with lock(url):
            if all(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
                shutil.rmtree(scratch, ignore_errors=True)
        turn.give_back()


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
