"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, or a bar on `advml repro`'s board."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from advml.core.messages import is_quiet, tell

BOARD = "ADVML_BOARD"  # a file: a stage under `advml repro` reports there instead of drawing


BAR, TITLE = 16, 28  # columns: least of a bar, most of a title; with the times they fit into 80
UNFINISHED = 0.99  # the largest share that is shown before the end: what follows the last unit, such as writing files, is work too


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Share(ProgressColumn):
        """Rounded down: 100 % is all of it."""

        def render(self, task: Any) -> Text:
            return Text(f"{int(task.percentage):>3} %")

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=TITLE)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, width=BAR)),  # of columns with a ratio, rich takes `width` for the least
        Share(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True),
        expand=True,
    )


class Bar:
    """`with Bar("pretrain CL-at-s0", total=400) as bar: bar.reach(1, "loss 1.23")`.

    It shows 100 % when the block is left without an error, and never before.

    Args:
        title: what is being done, e.g. stage and model.
        total: units of work.
        brief: without a terminal, say nothing at the end.
    """

    LINE_EVERY = 15.0  # seconds between lines where no terminal shows a bar
    DRAW_EVERY = 0.2
    READ_EVERY = 1.0

    def __init__(self, title: str, *, total: int, brief: bool = False) -> None:
        self.title, self.total, self.brief, self.done, self.note, self.begun = title, max(1, total), brief, 0, "", 0
        self.started = self.last_line = time.monotonic()
        self.last_drawn, self.last_read = 0.0, -math.inf
        self._note: str | Callable[[], str] = ""
        self.already: int | None = None
        self.board = os.environ.get(BOARD)
        self.bars = None

    def __enter__(self) -> Bar:
        if not self.board and sys.stderr.isatty() and not is_quiet():
            self.bars = _bars()
            self.bars.start()
            self.task = self.bars.add_task(self.title, total=self.total, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars:
            self.bars.update(self.task, completed=self.shown if kind else self.total)
            self.bars.stop()
        elif kind is None and not self.brief:
            tell(f"{self.title}: done in {time.monotonic() - self.started:.0f} s  {self._read(math.inf)}")

    @property
    def shown(self) -> float:
        """Units that are shown as finished while the work goes on."""
        return min(self.done, UNFINISHED * self.total)

    def reach(self, done: int, note: str | Callable[[], str] | None = None) -> None:
        """Say that `done` units are finished and show `note` (e.g. the running loss) behind the bar.

        A function is called for the note when it is shown, READ_EVERY seconds at most, for it may have to wait for a device.
        """
        if self.already is None:
            self.already = done  # what an interrupted process had finished says nothing about this one's speed
        self.done, now = done, time.monotonic()
        self._note = self._note if note is None else note
        if self.bars:
            self.bars.update(self.task, completed=self.shown, note=self._read(now))
        elif self.board and now - self.last_drawn > self.DRAW_EVERY:
            self.last_drawn = now
            self._read(now)
            with contextlib.suppress(OSError), open(self.board, "w", encoding="utf-8") as file:  # a torn read shows nothing for a frame
                json.dump({"title": self.title, "done": self.shown, "total": self.total, "note": self.note}, file)
        elif now - self.last_line > self.LINE_EVERY:
            self._line(now)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as finished."""
        self.reach(self.done + units, note)

    def begin(self, part: str) -> None:
        """Say which part of the work begins, where a unit is a part: those begun before it are finished."""
        self.reach(self.begun, part)
        self.begun += 1

    def _read(self, now: float) -> str:
        if isinstance(self._note, str):
            self.note = self._note
        elif now - self.last_read >= self.READ_EVERY:
            self.note, self.last_read = self._note(), now
        return self.note

    def _line(self, now: float) -> None:
        self._read(now)
        self.last_line, rate = now, (self.done - self.already) / (now - self.started)
        left = f", about {(self.total - self.done) / rate:.0f} s left" if rate else ""
        tell(f"{self.title}: {int(100 * self.shown / self.total)} %{left}  {self.note}")


class Board:
    """The board of `advml repro`: a bar for the whole pipeline and one for every stage at work.

    Without a terminal it prints a line per finished stage.

    Args:
        total: number of stages.
        folder: where each reports, to STAGE.progress.
    """

    def __init__(self, *, total: int, folder: Path) -> None:
        self.total, self.folder, self.finished = total, folder, 0
        self.begun: dict[str, float] = {}
        self.bars = _bars() if sys.stderr.isatty() and not is_quiet() else None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Board:
        if self.bars:
            self.bars.start()
            self.overall = self.bars.add_task("all stages", total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def show(self, name: str) -> None:
        """Draw what a running stage has reported."""
        self.begun.setdefault(name, time.monotonic())
        if not self.bars:
            return
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=None, note="starting")
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # it has just ended, or is writing
            state = json.loads((self.folder / f"{name}.progress").read_text(encoding="utf-8"))
            fields = {"description": state["title"], "total": state["total"], "completed": state["done"], "note": state["note"]}
            self.bars.update(self.tasks[name], **fields)

    def finish(self, name: str, *, ok: bool) -> None:
        """Take a stage off the board and leave a line behind."""
        self.finished += 1
        seconds = time.monotonic() - self.begun.pop(name)
        line = f"[{self.finished}/{self.total}] {name}: {'done' if ok else 'FAILED'} in {seconds:.0f} s"
        if self.bars:
            self.bars.remove_task(self.tasks.pop(name))
            self.bars.update(self.overall, completed=self.finished)
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            tell(line)
