"""Progress on stderr: bars on a terminal, lines elsewhere. Stages of `advml repro` report to that command's board of bars."""

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

BOARD = "ADVML_BOARD"  # environment variable: file to which a stage under `advml repro` reports, instead of drawing


BAR, TITLE = 16, 28  # least width of a bar, largest width of a title; with the times they fit into 80 columns
UNFINISHED = 0.99  # largest share shown before the end, because work such as writing files follows the last unit


def _terminal() -> Any:
    """Rich console on stderr; None if stderr is not a terminal, or under --quiet."""
    if not sys.stderr.isatty() or is_quiet():
        return None
    from rich.console import Console

    return Console(stderr=True)


class Redrawn(contextlib.ExitStack):
    """Display on a terminal that is redrawn at most every EVERY seconds; does nothing elsewhere.

    It uses no thread, so that Ctrl-C cannot interrupt a thread that is drawing.
    """

    EVERY = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.live, self.drawn = None, 0.0
        if console := _terminal():
            from rich.live import Live

            self.live = self.enter_context(Live(console=console, auto_refresh=False, transient=True))

    def draw(self, render: Callable[[], Any]) -> None:
        """Draw the result of `render`, unless the last drawing was less than EVERY seconds ago."""
        if self.live and time.monotonic() - self.drawn > self.EVERY:
            self.drawn = time.monotonic()
            self.live.update(render(), refresh=True)


def _bars() -> Any:
    """Rich progress bars on a terminal; None without one."""
    if (console := _terminal()) is None:
        return None
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Share(ProgressColumn):
        """Percentage, rounded down, so that 100 % means finished."""

        def render(self, task: Any) -> Text:
            return Text(f"{int(task.percentage):>3} %")

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=TITLE)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, width=BAR)),  # with a ratio, rich treats `width` as the minimum
        Share(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis")),
        console=console,
        expand=True,
    )


class Bar:
    """Progress bar: `with Bar("pretrain CL-at-s0", total=400) as bar: bar.reach(1, "loss 1.23")`.

    It shows 100 % only when the block is left without an error.

    Args:
        title: description of the work, e.g. stage and model.
        total: number of units of work.
        brief: print no line at the end if there is no terminal.
        silent: show nothing.
    """

    LINE_EVERY = 15.0  # seconds between lines if there is no terminal
    DRAW_EVERY = 0.2
    READ_EVERY = 1.0

    def __init__(self, title: str, *, total: int, brief: bool = False, silent: bool = False) -> None:
        self.title, self.total, self.brief, self.silent = title, max(1, total), brief, silent
        self.done, self.note, self.begun = 0, "", 0
        self.started = self.last_line = time.monotonic()
        self.last_drawn, self.last_read = 0.0, -math.inf
        self._note: str | Callable[[], str] = ""
        self.already: int | None = None
        self.board = os.environ.get(BOARD)
        self.bars = None

    def __enter__(self) -> Bar:
        self.bars = None if self.board or self.silent else _bars()
        if self.bars:
            self.bars.start()
            self.task = self.bars.add_task(self.title, total=self.total, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars:
            self.bars.update(self.task, completed=self.shown if kind else self.total)
            self.bars.stop()
        elif kind is None and not self.brief and not self.silent:
            tell(f"{self.title}: done in {time.monotonic() - self.started:.0f} s  {self._read(math.inf)}")

    @property
    def shown(self) -> float:
        """Number of units to show as finished, below the total while work goes on."""
        return min(self.done, UNFINISHED * self.total)

    def reach(self, done: int, note: str | Callable[[], str] | None = None) -> None:
        """Show `done` units as finished, with a note (e.g. the running loss) after the bar.

        A note may be a function, which is called at most every READ_EVERY seconds, since it may have to wait for a GPU.
        """
        if self.silent:
            return
        if self.already is None:
            self.already = done  # units finished before an interruption are excluded from the speed
        self.done, now = done, time.monotonic()
        self._note = self._note if note is None else note
        if self.bars:
            self.bars.update(self.task, completed=self.shown, note=self._read(now))
        elif self.board and now - self.last_drawn > self.DRAW_EVERY:
            self.last_drawn = now
            self._read(now)
            with contextlib.suppress(OSError), open(self.board, "w", encoding="utf-8") as file:  # a partial read skips one redraw
                json.dump({"title": self.title, "done": self.shown, "total": self.total, "note": self.note}, file)
        elif now - self.last_line > self.LINE_EVERY:
            self._line(now)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as finished."""
        self.reach(self.done + units, note)

    def begin(self, part: str) -> None:
        """Show the name of the next part, if each unit is a part; counts the previous part as finished."""
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
    """Display of `advml repro`: a bar for the pipeline and one per running stage; without a terminal, a line per finished stage.

    Args:
        total: number of stages.
        folder: of the files STAGE.progress, in which stages report.
    """

    def __init__(self, *, total: int, folder: Path) -> None:
        self.total, self.folder, self.finished = total, folder, 0
        self.begun: dict[str, float] = {}
        self.bars = _bars()
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
        """Update the bar of a running stage from its file."""
        self.begun.setdefault(name, time.monotonic())
        if not self.bars:
            return
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=None, note="starting")
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # the stage has just ended, or is writing
            state = json.loads((self.folder / f"{name}.progress").read_text(encoding="utf-8"))
            fields = {"description": state["title"], "total": state["total"], "completed": state["done"], "note": state["note"]}
            self.bars.update(self.tasks[name], **fields)

    def finish(self, name: str, *, ok: bool) -> None:
        """Remove a stage's bar, and print a line with its result."""
        self.finished += 1
        seconds = time.monotonic() - self.begun.pop(name)
        line = f"[{self.finished}/{self.total}] {name}: {'done' if ok else 'FAILED'} in {seconds:.0f} s"
        if self.bars:
            self.bars.remove_task(self.tasks.pop(name))
            self.bars.update(self.overall, completed=self.finished)
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            tell(line)
