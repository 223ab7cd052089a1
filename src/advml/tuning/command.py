"""`advml tune attack|finetune|pretrain`: one command from the empty study to the proposal, or from wherever the last one got to.

The command's process is the driver: it alone opens the database, takes the next trial, receives reports, stops trials, and writes files
and MLflow runs. Trials run in processes of the engine's slots.
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
from advml.core.messages import tell
from advml.core.passwords import masked
from advml.core.paths import Workspace, checked_name
from advml.core.signals import deferred
from advml.engine.cluster import connect
from advml.engine.exclusive import this_process
from advml.engine.fork_server import server
from advml.engine.process_task import Call, Lost, Pool, call_here
from advml.engine.stage_task import sent_environment
from advml.tuning import outputs
from advml.tuning import study as studies
from advml.tuning.search import Search, on_bench
from advml.tuning.space import show
from advml.tuning.storage import HOLDER, address, alone, close, told
from advml.tuning.study import ORIGIN, REASON, best_of, finished, scores

# What the fork server imports for the processes; the last one is what Optuna imports when it is first used.
MODULES = (
    *("advml.cli", "advml.tuning.attack_trial", "advml.tuning.training_trial", "advml.tuning.outputs", "advml.figures.searches"),
    "optuna.importance",
)
POLL = 0.25  # seconds between two looks at a study without news
HOPELESS = 5  # trials that all fail: so will the next
# Attributes of the study: the winner's measurements, and those that do not depend on the winner
CONFIRMED, MEASURED = "confirmed", "measured"


@dataclass(frozen=True)
class Outcome:
    """What a command leaves behind.

    Attributes:
        trials: the finished ones.
        best: None if no trial keeps the constraints, or none has run to its end.
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
    """Run the study until it has `trials` finished trials, of all commands together; then confirm the winner and write it all down.

    However it ends, by Ctrl-C too, the best so far is written to `reports/tune/<name>/` and the MLflow runs are ended.

    Args:
        search: what to search; checked.
        storage: URL of the studies' database; None: optuna.db in the workspace.
        slots: trials at a time; a running scheduler has its own.
        replace: whether a study of this name that searched something else is thrown away.
        cluster: see `advml.engine.cluster.connect`.
        watch: given all trials again and again while they run.
    Raises:
        UserError: the database, the study or the cluster cannot be used, or another command works on the study.
        Failure: all trials fail, or the database does.
    """
    checked_name(search.name)  # its folders are removed in the end
    workspace = Workspace(Path(os.path.relpath(search.root)))  # as messages are to name it
    url, scratch = address(storage, root=workspace.root), workspace.scratch(f"tune/{search.name}").resolve()
    with contextlib.ExitStack() as stack:
        forks = stack.enter_context(server(workspace.root, MODULES)) if cluster is None else {}
        check = stack.enter_context(alone(url, search.name))
        stack.enter_context(told())
        study = studies.create(search, url, replace=replace)
        stack.callback(close, study)
        folder = workspace.reports / "tune" / search.name
        if not replace and (folder / outputs.BEST).exists() and not finished(study.get_trials(deepcopy=False)):
            raise UserError(  # else its results would be written over
                f"{folder} holds the results of a search of which {masked(url)} knows nothing; "
                f"give this one a name of its own: --name {search.name}-2, or let it write over them: --replace"
            )
        study.set_user_attr(HOLDER, this_process())
        studies.requeue_dead(study)
        identity = study.user_attrs[studies.IDENTITY]
        params = {"tune": {search.kind: search.spec.model_dump(mode="json")}}
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
                best = f"the best so far is trial {so_far.best.number}: {show(so_far.best.params)}; it stands in {folder}"
                tell(f"{search.name}: {len(so_far.trials)} of {trials} trials; {best}")
            raise
        outcome = driver.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return outcome


@dataclass
class Driver:
    """The command at work on its study.

    Attributes:
        folder: of the files that it leaves.
        scratch: of this very study: trials of another one of its name are numbered alike.
        forks: environment of processes that are forked from the server of imports.
        check: raises Failure if another command may have taken the study over.
        total: finished trials wanted.
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
        """Run trials until enough have finished. Raises Failure if all fail."""
        earlier = len(finished(self.trials()))
        while True:
            with deferred():  # a Ctrl-C waits for the pause: it would leave half of a drawing or a transaction
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
        """Deal with a report, a result or the loss of a trial."""
        try:
            news = call.take()
        except Lost:
            del self.at_work[number]
            studies.requeue_dead(self.study, alive={*self.at_work})
            return
        if not call.is_finished:  # it is a report
            call.answer(studies.note(trial, *news))
            return
        del self.at_work[number]
        studies.finish(self.study, trial, news)
        shutil.rmtree(self.scratch_of(trial), ignore_errors=True)

    def scratch_of(self, trial: optuna.Trial) -> Path:
        return self.scratch / f"trial-{trial.user_attrs[ORIGIN]}"

    def look(self) -> None:
        """Once a second: who is there to work, and whether the study is still this command's."""
        if (now := time.monotonic()) - self._looked > 1:
            self.check()
            self.workers = self.pool.slots.client.nthreads()
            if not self.workers:
                self.pool.slots.count()  # says so, and raises what a queue has said against jobs
            self._looked = now

    def wait(self) -> None:
        """For news, or a moment."""
        self.pool.news.wait(POLL)
        self.pool.news.clear()

    def stop(self) -> None:
        """End what is at work, and queue it again."""
        for _, call in self.at_work.values():
            call.cancel()
        self.pool.close()
        studies.requeue_dead(self.study)

    # The winner

    def confirm(self) -> None:
        """Measure the winner once more, and what else was asked for, unless an earlier command has. Test images are looked at once."""
        best, attributes = best_of(self.trials(), self.search.directions), self.study.user_attrs
        if best is None:
            return
        known = attributes.get(CONFIRMED, {"trial": None, "times": 0})
        has, wanted = known.get("seeds", self.search.further_seeds), self.search.further_seeds  # the first n of one sequence
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
        """What this command or an earlier one has measured of this winner."""
        known = self.study.user_attrs.get(CONFIRMED)
        if best is None or known is None or known["trial"] != best.number:
            return None
        times = {"winners_confirmed": known["times"]} if known["times"] > 1 else {}
        return known["of"] | self.study.user_attrs.get(MEASURED, {}) | times

    # Files and runs

    def log(self, trials: Sequence[FrozenTrial]) -> None:
        """Bring the MLflow runs up to date."""
        changed = [trial for trial in trials if trial.state != self._logged.get(trial.number, TrialState.WAITING)]
        self._logged |= {trial.number: trial.state for trial in changed}
        self.run.show([outputs.fact(self.search, trial) for trial in changed if ORIGIN in trial.user_attrs])  # else it never began

    def close(self) -> Outcome:
        """Write files and figures, and complete the runs."""
        trials = self.trials()
        best = best_of(trials, self.search.directions)
        found = self.confirmed(best)
        files = call_here(self.forks, outputs.write, self.folder, self.search, trials, found)
        self.log(trials)
        if best is not None:
            self.run.mark_best(best.number)
        self.run.log_results(self.folder, files, scores(self.search.metrics, best) if best is not None else {})
        return Outcome(self.folder, finished(trials), best, found, files)
