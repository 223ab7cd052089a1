"""Searches in MLflow: a parent run with a nested run per trial, which has parameters, curves and final state.

The command's own process writes all of it, from the study's database: workers that are killed leave no run behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advml.tracking import store as stores
from advml.tracking.results import search
from advml.tracking.run import Run, guarded
from advml.tracking.store import DIGEST, NOTE
from advml.tracking.sync import log

NESTED_IN, TRIAL, STATE, BEST = "mlflow.parentRunId", "advml.trial", "advml.state", "advml.best"
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


@dataclass(frozen=True)
class Trial:
    """Logged content of a trial."""

    number: int
    state: str  # running, complete, pruned, failed or killed
    params: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)  # its scores
    history: Sequence[Mapping[str, Any]] = ()  # one record per epoch, for `Run.log_epochs`
    reason: str | None = None  # of a failure


class SearchRun(Run):
    """Parent run of a search; each call of `show` logs the changes since the last one."""

    _trials: dict[int, Run] | None = None  # by number

    def _known(self) -> dict[int, Run]:
        """Nested runs, including those of earlier commands, so that none is created twice."""
        if self._trials is None:
            from mlflow.store.tracking import SEARCH_MAX_RESULTS_THRESHOLD

            of_this = f"tags.`{NESTED_IN}` = '{self.id}'"
            found = self.client.search_runs([self.store.experiment], of_this, max_results=SEARCH_MAX_RESULTS_THRESHOLD)
            self._trials = {int(one.data.tags[TRIAL]): Run(self.store, one) for one in found}
        return self._trials

    @guarded
    def show(self, trials: Sequence[Trial]) -> None:
        """Update nested runs: begin runs of new trials, complete and end runs of ended trials."""
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
        """Tag only the best trial."""
        for other, run in self._known().items():
            run.set_tags({BEST: "true" if other == number else None})
        self.set_tags({"advml.best_trial": str(number)})

    @guarded
    def log_results(self, folder: Path, files: Sequence[Path]) -> None:
        """Log the search's files in `folder` and the figures of its best trial, with the tags that `sync` sets."""
        result = search(folder)
        for file in {*files} - {*result.all_files}:
            self.client.log_artifact(self.id, str(file), "tune")
        if made := result.digest():
            log(self, result, result.read())
            self.set_tags({"advml.files": made, DIGEST: made})


def open_search(place: stores.Place, *, name: str, identity: str, tags: Mapping[str, Any], params: Mapping[str, Any]) -> SearchRun:
    """Start the parent run of a study, or resume the one that an earlier command began for this `identity`."""
    record = {"name": name, "kind": "search", "parameters": params}

    def begin() -> SearchRun:
        store = stores.connect(place)
        begun = store.find(study=identity)
        return SearchRun.begin(store, record, tags={**tags, "study": identity}, run_id=begun and begun.info.run_id)

    run = stores.attempt(place, begin) or SearchRun(None, None)
    run.strict = False
    return run
