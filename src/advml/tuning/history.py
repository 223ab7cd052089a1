"""A study in MLflow: one tree of runs in each tracking store, written by one of the commands that share the study and the store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from advml import tracking
from advml.config import Config, digest
from advml.lines import tell
from advml.passwords import masked
from advml.paths import Workspace
from advml.runtime import processes
from advml.tracking.store import locate
from advml.tuning import census, identity, outputs
from advml.tuning.turn import Turn
from advml.tuning.worker import Search

RETRY = 5.0  # seconds between two attempts to succeed a command that writes


class History:
    """The runs of a study: as a context manager, begun or taken up again, and ended; nothing as long as another command writes them."""

    def __init__(self, search: Search, config: Config, workspace: Workspace, study: optuna.Study, url: str) -> None:
        self._search, self._config, self._root = search, config, workspace.root
        self._identity = study.user_attrs.get(identity.IDENTITY, study.study_name)
        place = locate(config, root=workspace.root)
        owner = (place.uri, processes.machine()) if place.database else (masked(place.uri),)  # a file is one machine's
        self._turn, self._next = Turn(study, url, f"mlflow/{digest(*owner)[:16]}"), 0.0
        self._ending = contextlib.ExitStack()
        self._run: tracking.SearchRun | None = None

    def __enter__(self) -> History:
        if not self._is_ours():
            tell(f"{self._search.name}: its MLflow runs are written by {self._turn.holder}")
        return self

    def __exit__(self, *what: object) -> None:
        self._ending.__exit__(*what)

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """Bring the runs up to date."""
        if self._is_ours():
            self._run.show(facts(self._search, trials))

    def close(self, trials: Sequence[FrozenTrial], best: FrozenTrial | None, files: Sequence[Path]) -> None:
        """Write what is known in the end: the best trial, its scores, and the files."""
        self._next = 0.0
        self.show(trials)
        if self._run is None:
            return
        if best is not None:
            self._run.mark_best(best.number)
        scored = outputs.scores(self._search.metrics, best) if best is not None else {}
        self._run.log_results(self._root / "reports" / "tune" / self._search.name, files, scored)

    def _is_ours(self) -> bool:
        """Whether this command writes; it does from the moment on when nobody else does."""
        if self._run is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + RETRY
            if self._turn.take():
                self._ending.callback(self._turn.give_back)
                self._run = self._ending.enter_context(self._open())
        return self._run is not None

    def _open(self) -> tracking.SearchRun:
        search = self._search
        return tracking.open_search(
            self._config, root=self._root, name=search.name, identity=self._identity, tags=search.tags(), params=search.parameters()
        )


def facts(search: Search, trials: Sequence[FrozenTrial]) -> list[tracking.Trial]:
    """Trials as the history knows them."""
    return [
        tracking.Trial(
            number=trial.number,
            state=outputs.state_of(trial),
            params=search.proposal(trial.params),
            metrics=outputs.scores(search.metrics, trial),
            history=census.history_of(trial),
            reason=trial.user_attrs.get(census.REASON),
        )
        for trial in trials
        if outputs.state_of(trial) != "waiting" and census.PROCESS in trial.user_attrs
    ]
