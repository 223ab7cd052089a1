"""A search in MLflow: a parent run, and nested in it a run per trial, with parameters, curves and how it ended.

The command's own process writes all of it, from the study's database: workers that are killed leave no run behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from advml.core.io import sha256
from advml.core.paths import SEARCH_FILES
from advml.tracking import store as stores
from advml.tracking.results import log_best
from advml.tracking.run import DIGEST, NOTE, Run, guarded

NESTED_IN, TRIAL, STATE, BEST = "mlflow.parentRunId", "advml.trial", "advml.state", "advml.best"
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


@dataclass(frozen=True)
class Trial:
    """What is logged of a trial."""

    number: int
    state: str  # running, complete, pruned, failed or killed
    params: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)  # what it scored
    history: Sequence[Mapping[str, Any]] = ()  # one record per epoch, as `Run.log_epochs` takes them
    reason: str | None = None  # why it failed


class SearchRun(Run):
    """The parent run: `show` the trials again and again, each call logs what has changed."""

    _trials: dict[int, Run] | None = None  # by number

    def _known(self) -> dict[int, Run]:
        """The nested runs, also those that an earlier command has made, so that none is made twice."""
        if self._trials is None:
            search = partial(self.client.search_runs, [self.store.experiment], f"tags.`{NESTED_IN}` = '{self.id}'")
            pages = [search()]
            while token := pages[-1].token:
                pages.append(search(page_token=token))
            self._trials = {int(one.data.tags[TRIAL]): Run(self.store, one) for page in pages for one in page}
        return self._trials

    @guarded
    def show(self, trials: Sequence[Trial]) -> None:
        """Bring the nested runs up to date: new ones begin, those whose trial has ended are completed and end too."""
        known, search = self._known(), self.tags["advml.name"]
        for trial in trials:
            if (run := known.get(trial.number)) is None:
                record = {"name": f"{search}/{trial.number}", "kind": "trial", "parameters": trial.params}
                tags = {NESTED_IN: self.id, TRIAL: trial.number, "search": search}
                run = known[trial.number] = Run.begin(self.store, record, tags=tags)
            if trial.state in STATUS and run.tags.get(STATE) not in STATUS:
                run.log_epochs(trial.history)
                run.log_metrics(trial.metrics)
                run.set_tags({STATE: trial.state, NOTE: trial.reason})
                run.finish(STATUS[trial.state])

    @guarded
    def mark_best(self, number: int) -> None:
        """Tag the best trial, and no other."""
        for other, run in self._known().items():
            run.set_tags({BEST: "true" if other == number else None})
        self.set_tags({"advml.best_trial": str(number)})

    @guarded
    def log_results(self, folder: Path, files: Sequence[Path], scored: Mapping[str, Any]) -> None:
        """Log the files that the search has written into `folder`, and what its best trial scored; tagged as `sync` tags them."""
        log_best(self, scored)
        for file in files:
            self.client.log_artifact(self.id, str(file), "tune")
        written = [folder / name for name in SEARCH_FILES]
        if all(path.exists() for path in written):
            self.set_tags({"advml.files": sha256(*written), DIGEST: sha256(*written)})


def open_search(place: stores.Place, *, name: str, identity: str, tags: Mapping[str, Any], params: Mapping[str, Any]) -> SearchRun:
    """Start the parent run of a study, or go on with the one that an earlier command has begun for a study of this `identity`."""
    record = {"name": name, "kind": "search", "parameters": params}

    def begin(store: stores.Store) -> SearchRun:
        begun = store.find(study=identity)
        return SearchRun.begin(store, record, tags={**tags, "study": identity}, run_id=begun and begun.info.run_id)

    return stores.attempt(place, begin) or SearchRun(None, None)
