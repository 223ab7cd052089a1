"""A search as MLflow shows it: a parent run, and nested in it a run per trial, with parameters, curves and how it ended.

    >>> with open_search(config, root=root, name="attack-SL-AT-s0", identity="3f2a", tags={}, params=params) as run:
    ...     run.show(trials)                              # again and again; each call logs what has changed

The command's own process writes all of it, from the study's database: workers that are killed leave no run behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.tracking import results
from advml.tracking import store as stores
from advml.tracking.files import digest
from advml.tracking.run import Run, opened
from advml.tracking.start import DataInfo, Facts, start
from advml.tracking.writer import guarded

if TYPE_CHECKING:
    from mlflow.entities import Run as Record

    from advml.config import Config

PARENT, STUDY, TRIAL = "mlflow.parentRunId", "advml.study", "advml.trial"
STATE, BEST = "advml.state", "advml.best"
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
PAGE = 500


@dataclass(frozen=True)
class Trial:
    """What is logged of a trial.

    Attributes:
        state: running, complete, pruned, failed or killed.
        metrics: what it scored.
        history: one record per epoch, as `Run.log_epochs` takes them.
        reason: why it failed.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    reason: str | None = None


class SearchRun(Run):
    """The parent run."""

    def __init__(self, place: stores.Place, store: stores.Store | None, record: Record | None, *, root: Path, name: str) -> None:
        super().__init__(place, store, record, root=root)
        self._search = name
        self._ended_trials: set[int] = set()
        self._trials: dict[int, Run] = {}
        self._best: int | None = None
        if store is not None:
            self._find_trials()

    @guarded
    def _find_trials(self) -> None:
        """The runs that an earlier command has made, so that none is made twice."""
        token = None
        while True:
            page = self._store.client.search_runs(
                [self._store.experiment], f"tags.`{PARENT}` = '{self.id}'", max_results=PAGE, page_token=token
            )
            for record in page:
                number = int(record.data.tags[TRIAL])
                self._trials[number] = Run(self._place, self._store, record, root=self._root)
                self._ended_trials |= {number} if record.data.tags.get(STATE) in STATUS else set()
                self._best = number if BEST in record.data.tags else self._best
            if not (token := page.token):
                return

    @guarded
    def show(self, trials: Sequence[Trial]) -> None:
        """Bring the nested runs up to date: new ones begin, those whose trial has ended are completed and end too."""
        for trial in trials:
            if trial.number in self._ended_trials or (trial.state == "running" and trial.number in self._trials):
                continue
            run = self._trials.get(trial.number) or self._begin(trial)
            if trial.state in STATUS:
                run.log_epochs(trial.history)
                run.log_metrics(trial.metrics)
                run.set_tag(STATE, trial.state)
                if trial.reason:
                    run.set_tag("mlflow.note.content", trial.reason)
                run.finish(STATUS[trial.state])
                self._ended_trials.add(trial.number)

    def _begin(self, trial: Trial) -> Run:
        facts = Facts(
            f"{self._search}/{trial.number}", "trial", {PARENT: self.id, TRIAL: trial.number, "search": self._search}, trial.params
        )
        record = start(self._store, facts, root=self._root)
        self._trials[trial.number] = Run(self._place, self._store, record, root=self._root)
        return self._trials[trial.number]

    def log_results(self, folder: Path, files: Sequence[Path], scored: Mapping[str, Any]) -> None:
        """Log the files that the search has written into `folder`, and what its best trial scored; tagged as `sync` tags them."""
        self.log_metrics(results.best_scores(scored), instead_of=("best",))
        for file in files:
            self.log_file(file, "tune")
        found = results.search_of(folder)
        if all(path.exists() for path in found.paths):
            self.set_tag("advml.files", made := digest(*found.paths))
            self.set_tag("advml.digest", made)

    @guarded
    def mark_best(self, number: int) -> None:
        """Tag the best trial, and no other."""
        if self._best not in (None, number):
            self._store.client.delete_tag(self._trials[self._best].id, BEST)
        if number in self._trials:
            self._trials[number].set_tag(BEST, "true")
            self._best = number
        self._tag({"advml.best_trial": str(number)})


def open_search(
    config: Config,
    *,
    root: Path,
    name: str,
    identity: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    data: DataInfo | None = None,
) -> SearchRun:
    """Start the parent run of a study, or go on with the one that an earlier command has begun; other arguments as of `open_run`.

    Args:
        identity: what no other study has, also of the same name; a store is asked for the run that carries it.
    """
    place, root = stores.locate(config, root=root), Path(root).resolve()
    facts = Facts(name, "search", {**tags, STUDY: identity}, params, data)

    def begin(store: stores.Store) -> SearchRun:
        record = start(store, facts, root=root, run_id=_begun(store, identity))
        return SearchRun(place, store, record, root=root, name=name)

    return opened(place, begin) or SearchRun(place, None, None, root=root, name=name)


def _begun(store: stores.Store, identity: str) -> str | None:
    """The study's run in this store, unless there is none or it was deleted in the UI."""
    found = store.client.search_runs([store.experiment], f"tags.`{STUDY}` = '{identity}'", max_results=1)
    return found[0].info.run_id if found else None
