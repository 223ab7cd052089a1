"""`advml tune attack|finetune|pretrain`: run a search until its proposal is written, resuming an earlier command.

The command's process is the driver: it alone opens the database, chooses trials, receives reports, stops trials, and writes files and
MLflow runs. Trials run in processes in the engine's slots.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from advml import tracking
from advml.config.store import locate
from advml.core.errors import Failure, UserError
from advml.core.exclusive import holder_name
from advml.core.messages import tell
from advml.core.passwords import masked
from advml.core.paths import Workspace, checked_name
from advml.core.signals import deferred
from advml.engine.cluster import connect
from advml.engine.fork_server import server
from advml.engine.process_task import Call, Lost, Pool, call_here
from advml.engine.stage_task import sent_environment
from advml.tuning import outputs
from advml.tuning import study as studies
from advml.tuning.search import Search, on_bench
from advml.tuning.space import show
from advml.tuning.storage import HOLDER, address, alone, as_failure, close
from advml.tuning.study import ORIGIN, REASON, best_of, default_of, finished, is_feasible

# Modules that the fork server imports for the processes; the last one is imported by Optuna on first use.
MODULES = (
    *("advml.cli", "advml.tuning.attack_trial", "advml.tuning.training_trial", "advml.tuning.outputs", "advml.figures.searches"),
    "optuna.importance",
)
POLL = 0.25  # seconds between checks of a search without news
HOPELESS = 5  # number of failed first trials after which the search ends
# Attributes of the study: the winner's measurements, and those that do not depend on the winner
CONFIRMED, MEASURED = "confirmed", "measured"


@dataclass(frozen=True)
class Outcome:
    """Result of a search.

    Attributes:
        trials: the finished trials.
        best: the best trial; None if no trial fulfils the constraints, or none was completed.
    """

    folder: Path
    trials: list[FrozenTrial]
    best: FrozenTrial | None
    confirmed: dict[str, Any] | None
    files: list[Path]


def tune(
    search: Search,
    *,
    storage: str | None,
    trials: int,
    slots: int,
    replace: bool = False,
    cluster: str | None = None,
    watch: Callable[[Sequence[FrozenTrial]], None] = lambda trials: None,
) -> Outcome:
    """Run a search until it has `trials` finished trials, including those of earlier commands; then confirm the winner and write results.

    At every end, also by Ctrl-C, the best result so far is written to `reports/tune/<name>/`, and MLflow runs are ended.

    Args:
        search: a checked search.
        storage: URL of the database; None: optuna.db in the workspace.
        slots: number of trials at a time; ignored for a running scheduler, whose workers determine it.
        replace: whether an earlier search of this name with other settings is deleted.
        cluster: see `advml.engine.cluster.connect`.
        watch: called repeatedly with all trials while they run.
    Raises:
        UserError: database, search or cluster cannot be used, or another command works on the search.
        Failure: all trials fail, or the database does.
    """
    checked_name(search.name)  # because folders of this name are removed at the end
    workspace = Workspace(Path(os.path.relpath(search.root)))  # a relative path, for messages
    url, scratch = address(storage, root=workspace.root), workspace.scratch(f"tune/{search.name}").resolve()
    with contextlib.ExitStack() as stack:
        forks = stack.enter_context(server(workspace.root, MODULES)) if cluster is None else {}
        check = stack.enter_context(alone(url, search.name))
        stack.enter_context(as_failure())
        study = studies.create(search, url, replace=replace)
        stack.callback(close, study)
        folder = workspace.reports / "tune" / search.name
        if not replace and (folder / outputs.BEST).exists() and not finished(study.get_trials(deepcopy=False)):
            raise UserError(  # else its results would be overwritten
                f"{folder} contains results of a search that is not in {masked(url)}; "
                f"choose another name: --name {search.name}-2, or overwrite them: --replace"
            )
        study.set_user_attr(HOLDER, holder_name())
        studies.requeue_dead(study)
        identity = study.user_attrs[studies.IDENTITY]
        params = {"tune": {search.kind: search.spec.model_dump(mode="json") | {"trials": trials}}}  # with the number from --trials
        about = {"name": search.name, "identity": identity, "tags": search.tags(), "params": params}
        run = stack.enter_context(tracking.open_search(locate(search.config.tracking, root=workspace.root), **about))
        driver = Driver(search, study, run, folder, scratch / identity, forks, check, trials, watch)
        try:
            with connect(cluster, root=workspace.root, jobs=slots, options=search.config.cluster) as where:
                wants_gpu = search.config.runtime.device in ("auto", "cuda")
                driver.pool = Pool(where, workspace.root, forks | sent_environment(), wants_gpu)
                try:
                    driver.search_on()
                    driver.confirm()
                finally:
                    driver.stop()
        except BaseException:
            so_far = driver.close()
            if so_far.best is not None:
                best = f"the best so far is trial {so_far.best.number}: {show(so_far.best.params)}; see {folder}"
                tell(f"{search.name}: {len(so_far.trials)} of {trials} trials; {best}")
            raise
        outcome = driver.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return outcome


@dataclass
class Driver:
    """State and steps of the command that runs a search.

    Attributes:
        folder: of the files that it writes.
        scratch: folder for unfinished trials of this search only, since another one of its name has the same trial numbers.
        forks: environment variables for processes of the fork server.
        check: raises Failure if another command may have taken over the search.
        total: number of finished trials at which the search ends.
    """

    search: Search
    study: optuna.Study
    run: tracking.SearchRun
    folder: Path
    scratch: Path
    forks: dict[str, str]
    check: Callable[[], None]
    total: int
    watch: Callable[[Sequence[FrozenTrial]], None]
    pool: Pool | None = None
    workers: dict[str, int] = field(default_factory=dict)  # address of each worker of the pool -> its slots
    at_work: dict[int, tuple[optuna.Trial, Call]] = field(default_factory=dict)
    _logged: dict[int, TrialState] = field(default_factory=dict)
    _looked: float = 0.0

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    # Trials

    def search_on(self) -> None:
        """Run trials until enough have finished; raises Failure if all fail."""
        earlier = len(finished(self.trials()))
        while True:
            with deferred():  # delay Ctrl-C, which could interrupt a transaction or the display
                self.look()
                for number, (trial, call) in list(self.at_work.items()):
                    if call.is_ready(self.workers):
                        self.take(number, trial, call)
                trials = self.trials()
                ended = finished(trials)
                hopeless = len(ended) - earlier >= HOPELESS and all(trial.state == TrialState.FAIL for trial in ended)
                wanted = 0 if hopeless else self.total - len(ended)
                for _ in range(min(sum(self.workers.values()), wanted) - len(self.at_work)):
                    trial = studies.next_trial(self.study, self.search)
                    call = Call(self.pool, on_bench, self.search, "trial", dict(trial.params), self.scratch_of(trial))
                    self.at_work[trial.number] = trial, call
                self.watch(trials)
                self.log(trials)  # while the processes work
            if hopeless:
                raise Failure(f"the first {HOPELESS} trials all failed, the last one: {ended[-1].user_attrs[REASON]}")
            if len(ended) >= self.total:
                return
            self.wait()

    def take(self, number: int, trial: optuna.Trial, call: Call) -> None:
        """Process a report, a result or the loss of a trial's process."""
        try:
            news = call.take()
        except Lost:
            del self.at_work[number]
            studies.requeue_dead(self.study, alive={*self.at_work})
            return
        if not call.is_finished:  # a report
            call.answer(studies.note(trial, *news))
            return
        del self.at_work[number]
        studies.finish(self.study, trial, news)
        shutil.rmtree(self.scratch_of(trial), ignore_errors=True)

    def scratch_of(self, trial: optuna.Trial) -> Path:
        return self.scratch / f"trial-{trial.user_attrs[ORIGIN]}"

    def look(self) -> None:
        """Check, once a second, the available workers, and that this command still holds the search's lock."""
        if (now := time.monotonic()) - self._looked > 1:
            self.check()
            self.workers = self.pool.slots.client.nthreads()
            if not self.workers:
                self.pool.slots.count()  # prints that there is no worker, or raises a queue's error
            self._looked = now

    def wait(self) -> None:
        """Wait for news of a call, at most POLL seconds."""
        self.pool.news.wait(POLL)
        self.pool.news.clear()

    def stop(self) -> None:
        """End running trials, and queue them again."""
        for _, call in self.at_work.values():
            call.cancel()
        self.pool.close()
        studies.requeue_dead(self.study)

    # The winner

    def confirm(self) -> None:
        """Measure the winner, and the measurements of `Search.once`, unless an earlier command has; test images are used only once."""
        best, attributes = best_of(self.trials(), self.search.directions), self.study.user_attrs
        if best is None:
            return
        known = attributes.get(CONFIRMED, {"trial": None, "times": 0})
        has, wanted = known.get("seeds", self.search.further_seeds), self.search.further_seeds  # seeds are the first n of one sequence
        is_new = known["trial"] != best.number
        if not is_new and has != wanted:
            what = f"{self.search.name}: trial {best.number} has been confirmed on {has} further seeds"
            tell(f"{what}; confirming it on {wanted}" if wanted > has else f"{what}, more than confirm = {wanted}; they stay")
        if is_new or wanted > has:
            found = self.measure("confirm", best.params)
            confirmed = {"trial": best.number, "times": known["times"] + is_new, "seeds": wanted, "of": found}
            self.study.set_user_attr(CONFIRMED, confirmed)
        for name in self.search.once:
            if name not in (measured := self.study.user_attrs.get(MEASURED, {})):
                self.study.set_user_attr(MEASURED, measured | {name: self.measure(name)})

    def measure(self, method: str, *values: Any) -> dict[str, Any]:
        """Call a method of the search's bench in a process of the pool."""
        call = Call(self.pool, on_bench, self.search, method, *values)
        while not call.is_ready(self.workers):
            with deferred():
                self.look()
            self.wait()
        return call.take()

    def confirmed(self, best: FrozenTrial | None) -> dict[str, Any] | None:
        """Measurements of this winner, by this command or an earlier one; None if there are none."""
        known = self.study.user_attrs.get(CONFIRMED)
        if best is None or known is None or known["trial"] != best.number:
            return None
        times = {"winners_confirmed": known["times"]} if known["times"] > 1 else {}
        return known["of"] | self.study.user_attrs.get(MEASURED, {}) | times

    # Files and runs

    def log(self, trials: Sequence[FrozenTrial]) -> None:
        """Update the MLflow runs."""
        changed = [trial for trial in trials if trial.state != self._logged.get(trial.number, TrialState.WAITING)]
        self._logged |= {trial.number: trial.state for trial in changed}
        self.run.show([outputs.fact(self.search, trial) for trial in changed if ORIGIN in trial.user_attrs])  # trials that have begun

    def close(self) -> Outcome:
        """Write files and figures, if a trial has finished, and complete the MLflow runs."""
        trials = self.trials()
        best = best_of(trials, self.search.directions)
        found = self.confirmed(best)
        files = call_here(self.forks, outputs.write, self.folder, self.search, trials, found) if finished(trials) else []
        self.log(trials)
        if best is not None:
            self.run.mark_best(best.number)
        self.run.log_results(self.folder, files)
        return Outcome(self.folder, finished(trials), best, found, files)


def nothing_to_apply(outcome: Outcome, search: Search) -> str | None:
    """Why the winner is no reason to change params.yaml: it is the default, or not better on validation. None: it is better."""
    best, default, confirmed = outcome.best, default_of(outcome.trials), outcome.confirmed or {}
    if len(search.metrics) > 1 or best is None or (default is not None and not is_feasible(default)):
        return None
    gains = []  # of the winner over the default, in accuracy
    if default is not None:
        if best.params == default.params:
            return "the best are the values of params.yaml"
        gains.append((best.values[0] - default.values[0]) * (1 if search.directions[0] == "maximize" else -1))
    if "confirmed" in confirmed:
        gains.append(confirmed["confirmed"]["validation"]["difference"]["robust"]["mean"])
    if "default" in confirmed.get("validation", {}):  # of attacks, for which a lower accuracy is better
        gains.append(confirmed["validation"]["default"]["accuracy"] - confirmed["validation"]["winner"]["accuracy"])
    return "on validation, the best values are not better than those of params.yaml" if any(gain <= 0 for gain in gains) else None
