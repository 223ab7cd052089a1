"""What the command shows while a study runs: the best trials and those at work on a terminal, a line per finished trial elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from advml.lines import tell
from advml.tuning.space import Values
from advml.tuning.trial_state import LATEST, REASON, finished, is_killed, name_of, ranked, running

SHOWN = 8  # of the best trials
REDRAW = 0.5  # seconds


class LiveTable:
    """`with LiveTable(name, metrics=("robust",), directions=("maximize",), total=40) as table: table.show(trials)`; it writes to stderr."""

    def __init__(self, name: str, *, metrics: Sequence[str], directions: Sequence[str], total: int) -> None:
        self.name, self.metrics, self.directions, self.total = name, metrics, directions, total
        self.told: set[int] | None = None
        self.live: Any = None
        self.drawn, self.started = 0.0, time.monotonic()

    def __enter__(self) -> LiveTable:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # Without a thread of its own: a Ctrl-C waits for `show`, not for that.
            self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """Bring the display up to date."""
        ended = sorted((trial for trial in trials if trial.state.is_finished()), key=lambda trial: trial.datetime_complete)
        if self.told is None:  # those of earlier commands
            self.told = {trial.number for trial in ended}
            if ended:
                tell(f"{self.name}: going on after {len(finished(trials))} finished trials")
        for trial in ended:
            if trial.number not in self.told:
                self.told.add(trial.number)
                if not self.live:
                    tell(self._line(trial, [other for other in ended if other.number in self.told]))
        if self.live and time.monotonic() - self.drawn > REDRAW:
            self.drawn = time.monotonic()
            self.live.update(self.table(trials), refresh=True)

    def _line(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> str:
        best = ranked(trials, self.directions)
        record = f"  (best: {self._scores(best[0])}, trial {best[0].number})" if best else ""
        return f"[{len(finished(trials))}/{self.total}] trial {trial.number}: {self.outcome(trial)}  {show(trial.params)}{record}"

    def outcome(self, trial: FrozenTrial) -> str:
        """`robust 0.812`, `pruned at 9`, `failed: out of memory`, ..."""
        if trial.state == TrialState.COMPLETE:
            broken = [name for name, violation in trial.constraints.items() if violation > 0]
            return self._scores(trial) + "".join(f", below the {name}" for name in broken)
        if trial.state == TrialState.PRUNED:
            return f"pruned at {trial.last_step}"
        if is_killed(trial):
            return "killed, to be tried again"
        return f"failed: {trial.user_attrs[REASON]}" if trial.state == TrialState.FAIL else name_of(trial)

    def _scores(self, trial: FrozenTrial) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self.metrics, trial.values, strict=True))

    def table(self, trials: Sequence[FrozenTrial]) -> Any:
        """The best trials, and those at work."""
        from rich.table import Table

        count, seconds = f"{len(finished(trials))} of {self.total} trials", time.monotonic() - self.started
        table = Table(
            *("trial", "outcome", "parameters"),
            title=f"{self.name}: {count}, {len(running(trials))} running, {seconds:.0f} s",
            title_justify="left",
        )
        for place, trial in enumerate(ranked(trials, self.directions)[:SHOWN]):
            table.add_row(str(trial.number), self.outcome(trial), show(trial.params), style="" if place else "bold")
        for trial in running(trials):
            table.add_row(str(trial.number), f"running{reached(trial)}", show(trial.params), style="dim")
        return table


def reached(trial: FrozenTrial) -> str:
    """`, at 3: robust=0.41 clean=0.98`, or '' before the first report."""
    if not trial.intermediate_values:
        return ""
    value = trial.intermediate_values[trial.last_step]
    return f", at {trial.last_step}: {show(trial.user_attrs.get(LATEST, {})) or format(value, '.4g')}"


def show(values: Values) -> str:
    """`learning_rate=0.00213 loss=trades`"""
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())
