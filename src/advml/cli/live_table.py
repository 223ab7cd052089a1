"""Progress display of `advml tune`: a table of best and running trials on a terminal, one line per finished trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from advml.core.messages import tell
from advml.core.progress import Redrawn
from advml.tuning.search import Search
from advml.tuning.space import show
from advml.tuning.study import LATEST, REASON, FrozenTrial, finished, name_of, ranked, running

SHOWN = 8  # number of best trials in the table


class LiveTable(Redrawn):
    """Display of a running search, on stderr: `with LiveTable(search, total=40) as table: tune(search, ..., watch=table.show)`.

    Args:
        total: number of finished trials at which the search ends.
    """

    def __init__(self, search: Search, *, total: int) -> None:
        super().__init__()
        self.search, self.total, self.started = search, total, time.monotonic()
        self.told: set[int] | None = None

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """Update the display."""
        ended = sorted((trial for trial in trials if trial.state.is_finished()), key=lambda trial: trial.datetime_complete)
        if self.told is None:  # trials of earlier commands get no line
            self.told = {trial.number for trial in ended}
            if ended:
                tell(f"{self.search.name}: going on after {len(finished(ended))} finished trials")
        if self.live:
            self.draw(lambda: self.table(trials))
            return
        for trial in (trial for trial in ended if trial.number not in self.told):
            self.told.add(trial.number)
            known = [other for other in ended if other.number in self.told]
            best = "".join(f"  (best: {self._scores(one)}, trial {one.number})" for one in ranked(known, self.search.directions)[:1])
            tell(f"[{len(finished(known))}/{self.total}] trial {trial.number}: {self.outcome(trial)}  {show(trial.params)}{best}")

    def outcome(self, trial: FrozenTrial) -> str:
        """Result of a trial in words: `robust 0.812`, `pruned at 9`, `failed: out of memory`, ..."""
        state = name_of(trial)
        if state == "complete":
            broken = [name for name, violation in trial.constraints.items() if violation > 0]
            return self._scores(trial) + "".join(f", below the {name}" for name in broken)
        others = {"pruned": f"pruned at {trial.last_step}", "killed": "killed, to be tried again"}
        return others.get(state) or f"failed: {trial.user_attrs[REASON]}"

    def _scores(self, trial: FrozenTrial) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self.search.metrics, trial.values, strict=True))

    def table(self, trials: Sequence[FrozenTrial]) -> Any:
        """Table of the best and the running trials."""
        from rich.table import Table

        count, seconds = f"{len(finished(trials))} of {self.total} trials", time.monotonic() - self.started
        title = f"{self.search.name}: {count}, {len(running(trials))} running, {seconds:.0f} s"
        table = Table("trial", "outcome", "parameters", title=title, title_justify="left")
        for place, trial in enumerate(ranked(trials, self.search.directions)[:SHOWN]):
            table.add_row(str(trial.number), self.outcome(trial), show(trial.params), style="" if place else "bold")
        for trial in running(trials):
            table.add_row(str(trial.number), f"running{reached(trial)}", show(trial.params), style="dim")
        return table


def reached(trial: FrozenTrial) -> str:
    """Latest intermediate result of a trial: `, at 3: robust=0.41 clean=0.98`, or '' before the first report."""
    if not trial.intermediate_values:
        return ""
    value = trial.intermediate_values[trial.last_step]
    return f", at {trial.last_step}: {show(trial.user_attrs.get(LATEST, {})) or format(value, '.4g')}"
