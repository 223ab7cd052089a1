"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """`with Progress("pretrain CL-at-s0", total=400) as bar: bar.advance(1, "loss 1.23")`.

    Args:
        title: what is being done, e.g. stage and model.
        total: units of work.
    """

    LINE_EVERY = 15.0  # seconds between lines where no terminal shows a bar

    def __init__(self, title: str, *, total: int) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""
        self.started = self.last_line = time.monotonic()
        self.already: int | None = None
        self.bar = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
        elif kind is None:
            print(f"{self.title}: done in {time.monotonic() - self.started:.0f} s  {self.note}".rstrip(), file=sys.stderr, flush=True)

    def reach(self, done: int, note: str | None = None) -> None:
        """Say that `done` units are finished and show `note` (e.g. the running loss) behind the bar."""
        if self.already is None:
            self.already = done  # what an interrupted process had finished says nothing about this one's speed
        self.done, self.note = done, self.note if note is None else note
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif time.monotonic() - self.last_line > self.LINE_EVERY:
            self.last_line = time.monotonic()
            rate = (self.done - self.already) / (self.last_line - self.started)
            left = f", about {(self.total - self.done) / rate:.0f} s left" if rate else ""
            print(f"{self.title}: {100 * self.done / self.total:.0f} %{left}  {self.note}".rstrip(), file=sys.stderr, flush=True)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as finished."""
        self.reach(self.done + units, note)
